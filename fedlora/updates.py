"""What the server receives in a round: the adapters of the clients that took part, with normalised weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fedlora import factors as algebra
from fedlora.adapter import Adapter, Factors
from fedlora.errors import AdapterError


@dataclass(frozen=True)
class Update:
    """One client's upload: its adapter after training and the number of examples it trained on."""

    client: int
    examples: int
    adapter: Adapter


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
            AdapterError: no update, a client twice, or no positive weight.
        """
        ordered = sorted(updates, key=lambda update: update.client)
        clients = tuple(update.client for update in ordered)
        if not ordered or len(set(clients)) != len(clients):
            raise AdapterError(
                f"an aggregate needs one update per client and at least one client, got clients {clients}"
            )
        raw = torch.tensor([1 if weighting == "uniform" else u.examples for u in ordered], dtype=torch.float64)
        if (raw < 0).any() or raw.sum() <= 0:
            raise AdapterError(f"client weights must be non-negative with a positive sum, got {raw.tolist()}")
        return cls(clients, tuple(update.adapter for update in ordered), raw / raw.sum())

    def __len__(self) -> int:
        return len(self.clients)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        return self.adapters[0].modules

    def factors(self, module: str) -> list[Factors]:
        """The clients' factors of one module, in client order."""
        return [adapter.factors[module] for adapter in self.adapters]

    def mean_factors(self, module: str) -> Factors:
        """`B̄, Ā` of a module, in float64."""
        return algebra.mean_factors(self.factors(module), self.weights)

    def mean_b(self, module: str) -> Tensor:
        """`B̄` of a module, in float64."""
        return algebra.mean([pair.B for pair in self.factors(module)], self.weights)

    def mean_head(self) -> Mapping[str, Tensor]:
        """The weighted mean of every head tensor, in float64."""
        return {
            name: algebra.mean([adapter.head[name] for adapter in self.adapters], self.weights)
            for name in self.adapters[0].head
        }
