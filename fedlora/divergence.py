"""How far a broadcast is from the mean of what the clients uploaded: ρ, its floor, and the conditions R, P, Q.

Measured around every strategy each round, from the uploads and the broadcasts alone (ALGORITHMS §2–3;
arXiv 2508.01348 for R, P, Q). All norms are Frobenius, all arithmetic is float64 in the coordinates of
`fedlora.factors.Frame`. Factors are compared without the scaling s, which cancels in ρ; R, P, Q and the dispersion are
in units of the products `B·A`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import Adapter, Factors
from fedlora.errors import AdapterError
from fedlora.factors import Frame
from fedlora.updates import Updates


@dataclass(frozen=True)
class ModuleDivergence:
    """One module's divergence in one round; squared quantities add up over modules.

    `error2 = Σ w_u ‖Ŵ_u − W*‖²`, `ideal2 = ‖W*‖²` and `tail2` (what rank r must leave out of `W*`) are in units of the
    product; `by_client` is ‖Ŵ_u − W*‖/‖W*‖ where the broadcast differs by client.
    """

    error2: float
    ideal2: float
    tail2: float
    R: float
    P: float
    Q: float
    dispersion: float
    effective_clients: float
    by_client: Mapping[int, float]

    @property
    def rho(self) -> float:
        return _ratio(self.error2, self.ideal2)

    @property
    def floor(self) -> float:
        return _ratio(self.tail2, self.ideal2)

    @property
    def excess(self) -> float:
        return self.rho - self.floor


@dataclass(frozen=True)
class Divergence:
    """The divergence of a round, by module and for the model (`ρ_model = sqrt(Σ error² / Σ ideal²)`)."""

    modules: Mapping[str, ModuleDivergence]

    @property
    def rho(self) -> float:
        return _ratio(self._sum("error2"), self._sum("ideal2"))

    @property
    def floor(self) -> float:
        return _ratio(self._sum("tail2"), self._sum("ideal2"))

    @property
    def excess(self) -> float:
        return self.rho - self.floor

    @property
    def effective_clients(self) -> float:
        """Mean over modules."""
        return self._sum("effective_clients") / len(self.modules)

    @property
    def R(self) -> float:
        return self._sum("R")

    @property
    def P(self) -> float:
        return self._sum("P")

    @property
    def Q(self) -> float:
        return self._sum("Q")

    @property
    def dispersion(self) -> float:
        return self._sum("dispersion")

    def _sum(self, name: str) -> float:
        return math.fsum(getattr(module, name) for module in self.modules.values())

    def to_json(self) -> dict[str, Any]:
        """`{module: {rho, floor, excess, …}}`, and the inverse is `from_json`."""
        return {
            name: {**asdict(module), "rho": module.rho, "floor": module.floor, "excess": module.excess}
            for name, module in self.modules.items()
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Mapping[str, Any]]) -> Divergence:
        names = [field.name for field in fields(ModuleDivergence)]
        return cls({module: ModuleDivergence(**_known(values, names)) for module, values in content.items()})


def _known(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The stored values of a module without the derived ones; JSON has made the clients' ids strings."""
    kept = {name: values[name] for name in names}
    kept["by_client"] = {int(client): rho for client, rho in kept["by_client"].items()}
    return kept


def measure(updates: Updates, broadcasts: Sequence[Adapter], mixing: Mapping[str, Tensor] | None = None) -> Divergence:
    """Compare what the clients will hold with the ideal.

    Args:
        updates: the round's uploads.
        broadcasts: the adapter each of these clients restarts from, in the same order (the same object for all where
            the broadcast is common; then it is measured once).
        mixing: by module, the weights (U) with which clients' B entered the broadcast, where not the clients' own.
    """
    mixing = mixing or {}
    return Divergence(
        {
            module: measure_module(
                updates.factors(module),
                updates.weights,
                [adapter.factors[module] for adapter in broadcasts],
                updates.clients,
                mixing.get(module),
            )
            for module in updates.modules
        }
    )


def measure_module(
    uploads: Sequence[Factors],
    weights: Tensor,
    broadcasts: Sequence[Factors],
    clients: Sequence[int] | None = None,
    mixing: Tensor | None = None,
) -> ModuleDivergence:
    """ρ, floor, R, P, Q and dispersion of one module, exact in float64.

    Args:
        uploads: (B_u, A_u) of U clients.
        weights: (U), summing to one.
        broadcasts: (B̂_u, Â_u) of the same clients; the same objects where all receive the same.
        clients: their ids, for `by_client`.
        mixing: (U), weights behind `effective_clients` (`weights` by default).
    """
    _require_equal_shapes(uploads, broadcasts)
    count, w = len(uploads), weights.tolist()
    common = all(pair is broadcasts[0] for pair in broadcasts)
    distinct = [broadcasts[0]] if common else list(broadcasts)
    frame = Frame([*uploads, *distinct])
    ideal = frame.combine(weights)
    products = (frame.product(index) for index in range(count))
    hats = [frame.product(count)] * count if common else (frame.product(count + index) for index in range(count))
    errors2, r2, spread2 = [], [], []
    error_of_common = _square(hats[0] - ideal) if isinstance(hats, list) else None
    for product, hat in zip(products, hats, strict=True):
        errors2.append(_square(hat - ideal) if error_of_common is None else error_of_common)
        r2.append(_square(hat - product))
        spread2.append(_square(product - ideal))
    ideal2 = _square(ideal)
    return ModuleDivergence(
        error2=_weighted(w, errors2),
        ideal2=ideal2,
        tail2=_tail(ideal, max(pair.rank for pair in distinct)),
        R=_weighted(w, r2),
        P=_weighted(
            w, [_square(hat.B.double() - own.B.double()) for hat, own in zip(broadcasts, uploads, strict=True)]
        ),
        Q=_weighted(
            w, [_square(hat.A.double() - own.A.double()) for hat, own in zip(broadcasts, uploads, strict=True)]
        ),
        dispersion=_weighted(w, spread2),
        effective_clients=effective_clients(weights if mixing is None else mixing),
        by_client={}
        if common or clients is None
        else {client: _ratio(error2, ideal2) for client, error2 in zip(clients, errors2, strict=True)},
    )


def _require_equal_shapes(uploads: Sequence[Factors], broadcasts: Sequence[Factors]) -> None:
    for own, hat in zip(uploads, broadcasts, strict=True):
        if own.B.shape != hat.B.shape or own.A.shape != hat.A.shape:
            raise AdapterError(
                f"a client that uploaded rank {own.rank} ({own.B.shape[0]} × {own.A.shape[1]}) is broadcast rank "
                f"{hat.rank} ({hat.B.shape[0]} × {hat.A.shape[1]}); P and Q compare factors of one shape"
            )


def effective_clients(weights: Tensor) -> float:
    """`1/Σ p̃²` with `p̃ = |p|/Σ|p|`: how many clients a combination amounts to (U when even, 1 when one has it all)."""
    magnitude = weights.double().abs()
    if not magnitude.any():
        return 0.0
    share = magnitude / magnitude.sum()
    return float(1 / share.square().sum())


def _tail(ideal: Tensor, rank: int) -> float:
    return _square(torch.linalg.svdvals(ideal)[rank:])


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum())


def _weighted(weights: Iterable[float], values: Iterable[float]) -> float:
    return math.fsum(w * value for w, value in zip(weights, values, strict=True))


def _ratio(numerator2: float, denominator2: float) -> float:
    """The root of a ratio of squares; 0/0 is 0 (nothing was learned and nothing was lost)."""
    if denominator2 == 0:
        return 0.0 if numerator2 == 0 else math.inf
    return math.sqrt(numerator2 / denominator2)
