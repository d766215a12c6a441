"""FFA-LoRA: A stays at its shared random start, only B is trained."""

from __future__ import annotations

from fedlora.adapter import Factors
from fedlora.adapter.updates import Updates
from fedlora.strategies.base import ONLY_B, Family, Plan, ServerState, Strategy, Traits


class FFALoRA(Strategy):
    """`B̄ = Σ w_u B_u` with one frozen A for all, so that the product of means is the mean of products.

    arXiv 2403.12313. A follows from the run's seed and is never sent. Our reading for clients of lower rank: they hold
    the first rows of A, and their B counts as zero beyond (which keeps the mean exact).
    """

    name = "ffa-lora"
    summary = "A frozen at one shared random start, mean of B: exact, half the bytes, half the capacity"
    source = "arXiv 2403.12313"
    traits = Traits(
        family=Family.PRODUCT_SUM,
        exact=True,
        shares="A",
        keeps_gauge=True,
        any_scaling=True,
        cost_up="r*d_out",
        cost_down="r*d_out",
    )

    def plan(self, round_number: int) -> Plan:
        return Plan(trains=ONLY_B, up=ONLY_B, down=ONLY_B)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        return state.with_factors(
            {
                module: Factors(updates.mean_b(module, state.rank(module)), state.adapter.factors[module].A.double())
                for module in updates.modules
            }
        )
