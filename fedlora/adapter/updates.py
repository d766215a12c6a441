"""What the server receives in a round: the adapters of the clients that took part, with normalised weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, overload

import torch
from torch import Tensor

from fedlora.adapter import factors as algebra
from fedlora.adapter.factors import ProductSum
from fedlora.adapter.weights import Adapter, Factors
from fedlora.errors import AdapterError


@dataclass(frozen=True)
class Update:
    """One client's upload: its adapter after training and the number of examples it trained on."""

    client: int
    examples: float
    adapter: Adapter


class ModuleUploads(Sequence[Factors]):
    """One module's factors of every client, in client order, read when asked for: adapters may live in files, and then
    only what is being looked at is in memory.

    Args:
        adapters: the clients' adapters.
        module: its name.
        rank: the rank to which each is padded with zeros or cut; as uploaded without it.
    """

    def __init__(self, adapters: Sequence[Adapter], module: str, rank: int | None = None) -> None:
        self._adapters, self._module, self._rank = adapters, module, rank

    def __len__(self) -> int:
        return len(self._adapters)

    @overload
    def __getitem__(self, index: int) -> Factors: ...
    @overload
    def __getitem__(self, index: slice) -> ModuleUploads: ...
    def __getitem__(self, index: int | slice) -> Factors | ModuleUploads:
        if isinstance(index, slice):
            return ModuleUploads(self._adapters[index], self._module, self._rank)
        pair = self._adapters[index].factors[self._module]
        return pair if self._rank is None else pair.at_rank(self._rank)

    def ranks(self) -> Iterator[int]:
        """The clients' ranks; nothing is read where factors in files say theirs."""
        for index, adapter in enumerate(self._adapters):
            known: Mapping[str, int] | None = getattr(adapter.factors, "ranks", None)
            own = known[self._module] if known is not None else self[index].rank
            yield own if self._rank is None else self._rank


def ranks_of(uploads: Sequence[Factors]) -> Iterable[int]:
    """The ranks of pairs, without reading them where that can be told."""
    return uploads.ranks() if isinstance(uploads, ModuleUploads) else (pair.rank for pair in uploads)


@dataclass(frozen=True)
class Updates:
    """The uploads of one round, in client order; `weights` (U, float64) are non-negative and sum to one."""

    clients: tuple[int, ...]
    adapters: tuple[Adapter, ...]
    weights: Tensor

    @classmethod
    def collect(cls, updates: Iterable[Update], weighting: Literal["examples", "uniform"] = "examples") -> Updates:
        """Sort by client and normalise the weights, in the one place where that is done.

        Raises:
            AdapterError: no update, a client twice, a negative weight or no positive one.
        """
        ordered = sorted(updates, key=lambda update: update.client)
        clients = tuple(update.client for update in ordered)
        if not ordered or len(set(clients)) != len(clients):
            raise AdapterError(
                f"an aggregate needs one update per client and at least one client, got clients {clients}"
            )
        raw = torch.tensor([1 if weighting == "uniform" else u.examples for u in ordered], dtype=torch.float64)
        if not torch.isfinite(raw).all() or (raw < 0).any() or raw.sum() <= 0:
            raise AdapterError(f"client weights must be non-negative with a positive sum, got {raw.tolist()}")
        return cls(clients, tuple(update.adapter for update in ordered), raw / raw.sum())

    def __len__(self) -> int:
        return len(self.clients)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        return self.adapters[0].modules

    def factors(self, module: str, rank: int | None = None) -> ModuleUploads:
        """The clients' factors of one module, in client order, padded with zeros (or cut) to `rank` where given."""
        return ModuleUploads(self.adapters, module, rank)

    def mean_product(self, module: str) -> ProductSum:
        """`W*/s = Σ w_u B_uA_u` of a module; ranks may differ."""
        return ProductSum.of(self.factors(module), self.weights)

    def mean_factors(self, module: str, rank: int | None = None) -> Factors:
        """`B̄, Ā` of a module, in float64; of factors padded with zeros to `rank` where given."""
        return algebra.mean_factors(self.factors(module, rank), self.weights)

    def mean_b(self, module: str, rank: int | None = None) -> Tensor:
        """`B̄` of a module, in float64."""
        return algebra.mean((pair.B for pair in self.factors(module, rank)), self.weights)

    def mean_a(self, module: str, rank: int | None = None) -> Tensor:
        """`Ā` of a module, in float64."""
        return algebra.mean((pair.A for pair in self.factors(module, rank)), self.weights)

    def folded(self) -> Updates:
        """The same uploads as plain factors, where they have cores."""
        return replace(self, adapters=tuple(adapter.folded() for adapter in self.adapters))

    def mean_cores(self) -> Mapping[str, Tensor]:
        """The weighted mean of every core, in float64."""
        return self._means(lambda adapter: adapter.cores)

    def mean_head(self) -> Mapping[str, Tensor]:
        """The weighted mean of every head tensor, in float64."""
        return self._means(lambda adapter: adapter.head)

    def mean_magnitudes(self) -> Mapping[str, Tensor]:
        """The weighted mean of every DoRA magnitude vector (d_out), in float64."""
        return self._means(lambda adapter: adapter.magnitudes)

    def _means(self, named: Callable[[Adapter], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        return {
            name: algebra.mean((named(adapter)[name] for adapter in self.adapters), self.weights)
            for name in named(self.adapters[0])
        }
