"""FFA-LoRA: A stays at its shared random start, only B is trained."""

from __future__ import annotations

from fedlora.adapter import Factors
from fedlora.strategies.base import Family, Plan, ServerState, Strategy
from fedlora.updates import Updates


class FFALoRA(Strategy):
    """`B̄ = Σ w_u B_u` with one frozen A for all, so that the product of means is the mean of products.

    arXiv 2403.12313. A follows from the run's seed and is never sent.
    """

    name, family, exact = "ffa-lora", Family.PRODUCT_SUM, True
    summary = "A frozen at one shared random start, mean of B: exact, half the bytes, half the capacity"
    source = "arXiv 2403.12313"

    def plan(self, round_number: int) -> Plan:
        return Plan(trains=frozenset({"B", "head"}), sends=frozenset({"B", "head"}))

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        return state.with_factors(
            {m: Factors(updates.mean_b(m), state.adapter.factors[m].A.double()) for m in updates.modules}
        )
