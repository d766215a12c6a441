"""The contract of a strategy: an aggregation–broadcast operator as a pure function on explicit state.

    plan(round)              -> what clients train and send
    aggregate(state, updates) -> new state
    broadcast(state, client) -> the adapter that the client restarts from

A strategy keeps nothing in itself: whatever it must remember is in `ServerState`, a value that is written to disk each
round. Divergence, bytes, heads and round numbers are the loop's business (`advance`), not the strategy's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from fedlora.adapter import Adapter, Factors, Part
from fedlora.config import Section
from fedlora.updates import Updates

ALL_PARTS: frozenset[Part] = frozenset({"A", "B", "head"})
NOTHING: frozenset[Part] = frozenset()


class Family(StrEnum):
    """Which of the two operator families of arXiv 2508.01348 a strategy belongs to."""

    SUM_PRODUCT = "SP"
    PRODUCT_SUM = "PS"
    CONTROL = "control"


@dataclass(frozen=True)
class Plan:
    """What the clients do in one round: the parts they train, and the parts that travel up and down."""

    trains: frozenset[Part] = ALL_PARTS
    sends: frozenset[Part] = ALL_PARTS


@dataclass(frozen=True)
class ServerState:
    """All that a strategy knows between rounds.

    `adapter` is the global adapter (fp32); `personal` holds what single clients keep for themselves;
    `diagnostics[module]` holds small tensors of the last aggregation that are worth showing (weights, objective).
    """

    adapter: Adapter
    personal: Mapping[int, Adapter] = field(default_factory=dict)
    diagnostics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    round: int = 0

    def with_factors(
        self, factors: Mapping[str, Factors], diagnostics: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> ServerState:
        """The state with new global factors (stored in fp32, as they are sent)."""
        stored = {module: pair.to(torch.float32) for module, pair in factors.items()}
        return replace(self, adapter=Adapter(stored, self.adapter.head), diagnostics=diagnostics or {})

    def with_head(self, head: Mapping[str, Tensor]) -> ServerState:
        """The state with a new global head (stored in fp32)."""
        stored = {name: tensor.to(torch.float32) for name, tensor in head.items()}
        return replace(self, adapter=Adapter(self.adapter.factors, stored))


class Strategy(ABC):
    """One way of combining adapters. Subclasses say what makes them different; the rest is here."""

    name: ClassVar[str]
    family: ClassVar[Family]
    exact: ClassVar[bool]
    """Whether the broadcast equals the mean of the clients' products by construction (ρ = 0)."""
    personal: ClassVar[bool] = False
    """Whether clients receive different adapters."""
    summary: ClassVar[str]
    source: ClassVar[str]

    class Options(Section):
        """What a user may set under `strategy_options`."""

    def __init__(self, options: Section | None = None) -> None:
        self.options = options if options is not None else self.Options()

    def plan(self, round_number: int) -> Plan:
        """What clients train and send in a round (1, 2, …); everything by default."""
        return Plan()

    @abstractmethod
    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        """The new state after a round. Must not depend on anything but its arguments, nor change them."""

    def broadcast(self, state: ServerState, client: int) -> Adapter:
        """What `client` restarts from; the global adapter by default."""
        return state.adapter


def advance(strategy: Strategy, state: ServerState, updates: Updates) -> ServerState:
    """One server step: aggregate the factors, average the heads that are sent, count the round."""
    new = strategy.aggregate(state, updates)
    if "head" in strategy.plan(state.round + 1).sends:
        new = new.with_head(updates.mean_head())
    return replace(new, round=state.round + 1)
