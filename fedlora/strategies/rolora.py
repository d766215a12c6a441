"""RoLoRA: the factors take turns, B in odd rounds, A in even ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.updates import Updates
from fedlora.errors import AdapterError
from fedlora.strategies.base import ONLY_A, ONLY_B, Family, Plan, ServerState, Strategy, Traits, one_factor, with_shared


class RoLoRA(Strategy):
    """The mean of the factor that was trained, beside the other, which all clients share: exact. arXiv 2502.01755.

    B first, because it starts at zero and A would not move beside it. A client that was away for a round is sent both
    factors. Our reading for clients of lower rank: their
    trained factor counts as zero beyond their rank.
    """

    name = "rolora"
    summary = "B and A take turns by round, mean of the one that was trained: exact, half the bytes"
    source = "arXiv 2502.01755"
    traits = Traits(
        family=Family.PRODUCT_SUM,
        exact=True,
        keeps_gauge=True,
        any_scaling=True,
        cost_up="r*d_out if odd else r*d_in",
        cost_down="r*d_in if odd else r*d_out",
    )

    def plan(self, round_number: int) -> Plan:
        now, before = (ONLY_B, ONLY_A) if _trains_b(round_number) else (ONLY_A, ONLY_B)
        return Plan(trains=now, up=now, down=before)

    def resume(self, state: ServerState, uploads: Sequence[tuple[str, Adapter]]) -> ServerState:
        """A round in which B was trained where all share A, otherwise one in which A was."""
        try:
            return with_shared(state, uploads, "A", self.name)
        except AdapterError:
            try:
                return replace(with_shared(state, uploads, "B", self.name), round=1)
            except AdapterError as error:
                raise AdapterError(f"{error} (or one A: it takes either)") from None

    def rescaled(self, uploads: Sequence[Adapter]) -> Literal["A", "B"]:
        """The factor that was trained: the other is shared, and stays as it is."""
        first = uploads[0].factors
        alike = (one_factor(each.factors[module], first[module], "A") for each in uploads[1:] for module in first)
        return "B" if all(alike) else "A"

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        by_b = _trains_b(state.round + 1)
        new = {}
        for module in updates.modules:
            shared, rank = state.adapter.factors[module].to_double(), state.rank(module)
            new[module] = (
                Factors(updates.mean_b(module, rank), shared.A)
                if by_b
                else Factors(shared.B, updates.mean_a(module, rank))
            )
        return state.with_factors(new)


def _trains_b(round_number: int) -> bool:
    return round_number % 2 == 1
