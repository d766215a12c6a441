"""The contract of a strategy: an aggregation–broadcast operator as a pure function on explicit state.

    plan(round)               -> what clients train, and what travels
    begin(state)              -> the state before round one
    aggregate(state, updates) -> new state
    broadcast(state, client)  -> the adapter that the client restarts from, at its rank

A strategy keeps nothing in itself: whatever it must remember is in `ServerState`, a value that is written to disk each
round. Divergence, bytes, heads, ranks and round numbers are the loop's business (`advance`), not the strategy's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fedlora import lazily
from fedlora.adapter import EVERY_PART, Adapter, Factors, Part
from fedlora.adapter.updates import Updates
from fedlora.errors import AdapterError
from fedlora.sections import Section
from fedlora.strategies.state import ServerState as ServerState  # noqa: PLC0414  plug-ins import it from here

NOTHING: frozenset[Part] = frozenset()
ONLY_B: frozenset[Part] = frozenset({"B", "magnitude", "head"})
ONLY_A: frozenset[Part] = frozenset({"A", "magnitude", "head"})


class Family(StrEnum):
    """Which of the two operator families of arXiv 2508.01348 a strategy belongs to."""

    SUM_PRODUCT = "SP"
    PRODUCT_SUM = "PS"
    CONTROL = "control"


class Refusal(NamedTuple):
    """Why a strategy does not go with a setting of the adapter."""

    setting: str
    """Below `lora`: `variant=dora`, `ranks`, `truncation=svd`."""
    reason: str


@dataclass(frozen=True)
class Plan:
    """What the clients do in one round: the parts they train, and the parts that travel up and down."""

    trains: frozenset[Part] = EVERY_PART
    up: frozenset[Part] = EVERY_PART
    down: frozenset[Part] = EVERY_PART


@dataclass(frozen=True)
class Traits:
    """What holds of a strategy whatever its options are."""

    family: Family
    exact: bool
    """Whether what clients of one rank hold after the broadcast is the mean of the clients' products (ρ = 0)."""
    personal: bool = False
    """Whether clients keep adapters of their own, so that there is no global model."""
    common_broadcast: bool = False
    """Of a class with a `broadcast` of its own: whether all clients of one rank are still sent the same."""
    changes_base: bool = False
    """Whether the frozen base is updated too."""
    shares: Literal["A", "B"] | None = None
    """The factor that is the same for all clients when they upload; `fedlora aggregate` checks it."""
    keeps_gauge: bool = False
    """Whether clients hold a factor that the server must not rotate."""
    in_svd_order: bool = False
    """Whether the global factors come in the order of the singular values of their product."""
    pools_data: bool = False
    """Whether one client trains on everybody's data: a control."""
    trains_core: bool = False
    """Whether clients train a matrix between fixed factors."""
    any_scaling: bool = False
    """Whether clients may have different scalings, brought to one s by B·(s_u/s): only the updates `s_u·B_u·A_u` count
    for what clients hold afterwards, not how each is split into s, B and A."""
    scales_by_module: bool = False
    """Where the base is changed: whether every module's own s is used (`state.scaling_of`), not `state.scaling`."""
    one_rank: str = ""
    """Why clients must all have one rank; empty where ranks are free."""
    cost_up: str = "r*(d_out + d_in)"
    """Numbers per module and client, in r (the client's rank), R (the sum of all clients' ranks), m (the lowest of
    them), d_out, d_in, and h (the option `heads`); an upper bound where the strategy drops what is small."""
    cost_down: str = "r*(d_out + d_in)"


class Strategy(ABC):
    """One way of combining adapters. Subclasses say what makes them different; the rest is here."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    traits: ClassVar[Traits]

    class Options(Section):
        """What a user may set under `strategy_options`."""

    def __init_subclass__(cls) -> None:
        """Traits are attributes of the class too, and may be said as such instead, as they were before `Traits`."""
        super().__init_subclass__()
        said = {each.name: getattr(cls, each.name) for each in fields(Traits) if hasattr(cls, each.name)}
        if "traits" not in vars(cls) and {"family", "exact"} <= said.keys():
            cls.traits = Traits(**said)
        for name, value in vars(cls.traits).items() if hasattr(cls, "traits") else ():
            setattr(cls, name, value)

    @classmethod
    def refusal(cls, variant: str, mixed_ranks: bool, svd_order: bool) -> Refusal | None:
        """Why the strategy cannot be combined with a variant, with clients of several ranks, or with SVD-ordered
        truncation; None where it can."""
        with_variant = partial(Refusal, f"variant={variant}")
        if variant in ("dora", "hira") and cls.traits.trains_core:
            return with_variant(f"it trains a matrix between A and B, which {variant} has no place for")
        if variant in ("dora", "hira") and cls.traits.changes_base:
            what = "DoRA's norm" if variant == "dora" else "HiRA's gate"
            return with_variant(
                f"it changes the base, and {what} depends on the base, so the update would not be exact"
            )
        if variant == "dora" and cls.traits.exact and not cls.traits.pools_data:
            return with_variant("it is exact only for products B·A, and DoRA's norm is not linear in them")
        if mixed_ranks and cls.traits.one_rank:
            return Refusal("ranks", f"it needs clients of one rank: {cls.traits.one_rank}")
        if svd_order and cls.traits.keeps_gauge:
            held = "its clients hold a factor that must stay as it is, so the server cannot turn the factors"
            return Refusal("truncation=svd", held)
        return None

    def __init__(self, options: Section | None = None) -> None:
        self.options = options if options is not None else self.Options()

    def refuses_rank(self, rank: int) -> str | None:
        """Why the strategy with its options cannot have a rank; None where it can."""
        return None

    def plan(self, round_number: int) -> Plan:
        """What clients train and what travels in a round (1, 2, …); everything by default."""
        return Plan()

    def begin(self, state: ServerState, weight: Callable[[str], Tensor]) -> ServerState:
        """The state before round one.

        Args:
            state: a fresh adapter, A random and B zero.
            weight: the base weight (d_out × d_in) of a module.
        """
        return state

    def resume(self, state: ServerState, uploads: Sequence[tuple[str, Adapter]]) -> ServerState:
        """The state that uploads from elsewhere were trained from, as far as they tell; for `fedlora aggregate`.

        Args:
            state: a fresh adapter, B zero.
            uploads: who, and their adapter.

        Raises:
            AdapterError: the uploads cannot come from a round of this strategy.
        """
        if self.traits.trains_core:
            raise AdapterError(f"strategy {self.name} trains a matrix between A and B, which PEFT folders do not hold")
        shared = self.traits.shares
        return with_shared(state, uploads, shared, self.name) if shared else state

    def rescaled(self, uploads: Sequence[Adapter]) -> Literal["A", "B"]:
        """The factor that takes up s_u/s where clients have different scalings (`any_scaling`)."""
        return "B"

    @abstractmethod
    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        """The new state after a round. Must not depend on anything but its arguments, nor change them."""

    def broadcast(self, state: ServerState, client: int) -> Adapter:
        """What `client` restarts from; the first indices of the global adapter up to its rank by default."""
        return state.adapter.cut(state.rank_of(client))

    @property
    def broadcasts_to_all(self) -> bool:
        """Whether all clients of one rank are sent the same adapter."""
        return self.traits.common_broadcast or type(self).broadcast is Strategy.broadcast

    def penalty(self, factors: Mapping[str, Factors], start: Adapter) -> Tensor | None:
        """A differentiable term that clients add to their loss, of the factors being trained (padded with zeros to the
        highest rank) and the adapter they started from; none by default."""
        return None

    def after_training(self, start: Adapter, trained: Adapter) -> Adapter:
        """What a client uploads after its training; may be of a lower rank. Everything by default."""
        return trained


def with_shared(
    state: ServerState, uploads: Sequence[tuple[str, Adapter]], part: Literal["A", "B"], strategy: str
) -> ServerState:
    """The state with the factor that all uploads share; those of lower rank have its first indices.

    Raises:
        AdapterError: two uploads have different ones; names the client and the module.
    """
    adapters = dict(uploads)
    longest = max(adapters, key=lambda who: adapters[who].rank)
    for who, adapter in adapters.items():
        for module in adapter.modules:
            if not one_factor(adapter.factors[module], adapters[longest].factors[module], part):
                raise AdapterError(
                    f"{who}: {part} of module '{module}' differs from that of {longest}; strategy {strategy} needs "
                    f"clients that share one {part}"
                )
    shared = {}
    for module, fresh in state.adapter.factors.items():
        taken = adapters[longest].factors[module]
        given = (
            Factors(torch.zeros_like(taken.B), taken.A) if part == "A" else Factors(taken.B, torch.zeros_like(taken.A))
        )
        shared[module] = given.to(torch.float32).at_rank(fresh.rank)
    return replace(state, adapter=state.adapter.with_factors(shared))


def one_factor(one: Factors, other: Factors, part: Literal["A", "B"]) -> bool:
    """Whether two pairs have the same A, or the same B, at the lower of their ranks."""
    rank = min(one.rank, other.rank)
    return torch.equal(getattr(one.at_rank(rank), part), getattr(other.at_rank(rank), part))


# It was here, and plug-ins may import it from here.
__getattr__ = lazily(__name__, {"advance": "fedlora.strategies.step"})
