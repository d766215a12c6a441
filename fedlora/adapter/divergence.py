"""How far a broadcast is from the mean of what the clients uploaded: ρ, its floor, and the conditions R, P, Q.

Measured around every strategy each round, from the uploads and the broadcasts alone (R, P, Q: arXiv 2508.01348). All
norms are Frobenius, all arithmetic is float64 in the coordinates of `fedlora.adapter.factors.Frame`. Factors are
compared without the scaling s, which cancels in ρ; R, P, Q and the dispersion are in units of the products `B·A`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import leading
from fedlora.adapter.base_update import BaseUpdate
from fedlora.adapter.factors import Frame, ProductSum
from fedlora.adapter.leading import Distances, distances, square
from fedlora.adapter.spread import Spread, apart
from fedlora.adapter.updates import Updates, ranks_of
from fedlora.adapter.weights import Adapter, Factors


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


def measure(
    updates: Updates,
    broadcasts: Sequence[Adapter],
    mixing: Mapping[str, Tensor] | None = None,
    base_step: BaseUpdate | None = None,
    scaling: float = 1.0,
    scalings: Mapping[str, float] | None = None,
    common: bool = False,
) -> Divergence:
    """Compare what the clients will hold with the ideal.

    Args:
        updates: the round's uploads.
        broadcasts: the adapter each of these clients restarts from, in the same order.
        mixing: by module, the weights (U) with which clients' B entered the broadcast, where not the clients' own.
        base_step: what the round added to the base (scaling included), part of what every client holds.
        scaling: s, which relates `base_step` to the products.
        scalings: those of modules that have another: their products count by its ratio to s in what adds up.
        common: whether clients of one rank restart from the same.
    """
    mixing, step, own = mixing or {}, base_step or BaseUpdate(), scalings or {}
    found = {}
    for module in updates.modules:
        s = own.get(module, scaling)
        measured = measure_module(
            updates.factors(module),
            updates.weights,
            [adapter.factors[module] for adapter in broadcasts],
            updates.clients,
            mixing.get(module),
            _unscaled(step.modules.get(module), s),
            common,
        )
        found[module] = measured if s == scaling else _in_units(measured, s / scaling)
    return Divergence(found)


def _in_units(measured: ModuleDivergence, ratio: float) -> ModuleDivergence:
    """The squares of products of another scaling, in units of the common one; P and Q are of factors."""
    squares = ("error2", "ideal2", "tail2", "R", "dispersion")
    return replace(measured, **{name: ratio**2 * getattr(measured, name) for name in squares})


def _unscaled(step: Factors | None, scaling: float) -> Factors | None:
    return None if step is None else Factors(step.B, step.A.to(torch.float64) / scaling)


def measure_module(
    uploads: Sequence[Factors],
    weights: Tensor,
    broadcasts: Sequence[Factors],
    clients: Sequence[int] | None = None,
    mixing: Tensor | None = None,
    base: Factors | None = None,
    common: bool = False,
) -> ModuleDivergence:
    """ρ, floor, R, P, Q and dispersion of one module, exact in float64.

    A common broadcast is measured once, and uploads are looked at one at a time, so that memory does not grow with the
    clients. Ranks may differ: P and Q compare an upload with a broadcast of another rank as if padded with zeros.

    Args:
        uploads: (B_u, A_u) of U clients.
        weights: (U), summing to one.
        broadcasts: (B̂_u, Â_u) of the same clients.
        clients: their ids, for `by_client`.
        mixing: (U), weights behind `effective_clients` (`weights` by default).
        base: what every client's base got in this round, in units of the product.
        common: whether clients of one rank receive the same, which is then measured once.
    """
    w = weights.tolist()
    groups = _groups(broadcasts, common)
    hats = [_held(broadcasts[members[0]], base) for members in groups]
    spread = _spread(uploads, w, sum(hat.rank for hat in hats))
    ideal, moves = ProductSum(broadcasts[0].shape), []
    for weight, upload, hat in zip(w, uploads, broadcasts, strict=True):
        own = upload.to_double()
        ideal.add(weight, own)
        moves.append(_moved(own, hat))
        if spread is not None:
            spread.add(weight, own)
    ranks = {hat.rank for hat in broadcasts}
    found, dispersion = _distances(ideal, hats, ranks, spread, w)
    errors2 = [0.0] * len(w)
    for error2, members in zip(found.errors2, groups, strict=True):
        for position in members:
            errors2[position] = error2
    ideal2, tail_of = found.ideal2, found.tails2
    return ModuleDivergence(
        error2=_weighted(w, errors2),
        ideal2=ideal2,
        tail2=_weighted(w, (tail_of[hat.rank] for hat in broadcasts)),
        R=errors2[0] + dispersion if len(groups) == 1 else _jumps(uploads, w, hats, groups),
        P=_weighted(w, (b for b, _ in moves)),
        Q=_weighted(w, (a for _, a in moves)),
        dispersion=dispersion,
        effective_clients=effective_clients(weights if mixing is None else mixing),
        by_client={}
        if len(groups) == 1 or clients is None
        else {client: _ratio(each, ideal2) for client, each in zip(clients, errors2, strict=True)},
    )


def _spread(uploads: Sequence[Factors], w: Sequence[float], others: int) -> Spread | None:
    """Where the joint rank of the uploads and others is too large for coordinates of them all, uploads are measured
    against the one with the most weight, as they are read."""
    joint, side = sum(ranks_of(uploads)), min(uploads[0].shape)
    if joint < leading.LARGE and joint + others < side:
        return None
    return Spread(uploads[max(range(len(w)), key=w.__getitem__)].to_double(), many=joint >= leading.LARGE)


def _distances(
    ideal: ProductSum, hats: Sequence[Factors], ranks: Collection[int], spread: Spread | None, w: Sequence[float]
) -> tuple[Distances, float]:
    """Of the ideal to what is held, and the dispersion: by leading directions where they suffice, otherwise in
    coordinates of everything."""
    if spread is not None:
        found = distances(ideal.operator(), [*hats, spread.about], ranks)
        if found is not None:
            *errors2, error2 = found.errors2
            return Distances(found.ideal2, errors2, found.tails2), spread.of(error2)
    frame = Frame(ideal, hats)
    exact = frame.distances(len(hats), ranks)
    if spread is None or not frame.is_dense:
        return exact, frame.spread(w)
    return exact, spread.of(square(frame.total - spread.about.product()))


def _groups(broadcasts: Sequence[Factors], common: bool) -> list[list[int]]:
    """Positions of clients that receive the same: those of one rank where the broadcast is common, else nobody."""
    found: dict[int, list[int]] = {}
    for position, pair in enumerate(broadcasts):
        found.setdefault(pair.rank if common else position, []).append(position)
    return list(found.values())


def _held(hat: Factors, base: Factors | None) -> Factors:
    """Adapter and base update of a client as one pair, in float64."""
    pair = hat.to_double()
    if base is None:
        return pair
    return Factors(torch.cat([pair.B, base.B.to(pair.B)], dim=1), torch.cat([pair.A, base.A.to(pair.A)]))


def _jumps(uploads: Sequence[Factors], w: Sequence[float], hats: Sequence[Factors], groups: list[list[int]]) -> float:
    """`Σ w_u ‖Ŵ_u/s − B_uA_u‖²`, each difference taken in coordinates of its own two pairs."""
    hat_of = {u: hat for hat, members in zip(hats, groups, strict=True) for u in members}
    jumps = (apart(own, hat_of[u]) for u, own in enumerate(uploads))
    return _weighted(w, jumps)


def _moved(own: Factors, hat: Factors) -> tuple[float, float]:
    """`‖B̂ − B‖²` and `‖Â − A‖²`, the shorter of each padded with zeros."""
    rank = max(own.rank, hat.rank)
    before, after = own.at_rank(rank), hat.at_rank(rank)
    return square(after.B.double() - before.B.double()), square(after.A.double() - before.A.double())


def effective_clients(weights: Tensor) -> float:
    """`1/Σ p̃²` with `p̃ = |p|/Σ|p|`: how many clients a combination amounts to (U when even, 1 when one has it all)."""
    magnitude = weights.double().abs()
    if not magnitude.any():
        return 0.0
    share = magnitude / magnitude.sum()
    return float(1 / share.square().sum())


def _weighted(weights: Iterable[float], values: Iterable[float]) -> float:
    return math.fsum(w * value for w, value in zip(weights, values, strict=True))


def _ratio(numerator2: float, denominator2: float) -> float:
    """The root of a ratio of squares; 0/0 is 0 (nothing was learned and nothing was lost)."""
    if denominator2 == 0:
        return 0.0 if numerator2 == 0 else math.inf
    return math.sqrt(numerator2 / denominator2)
