"""FLoRA: everybody's factors are stacked and merged into the base; adapters start afresh."""

from __future__ import annotations

from fedlora.adapter import Factors
from fedlora.adapter.factors import fresh_factors
from fedlora.adapter.updates import Updates
from fedlora.seeds import torch_generator
from fedlora.strategies.base import Family, Plan, ServerState, Strategy, Traits


class FLoRA(Strategy):
    """Base update `s·[B_1 … B_U]·[w_1A_1; …; w_UA_U] = W*`, exact for any ranks; then B = 0 and a fresh random A.

    arXiv 2409.05976. The stack is what travels down; the fresh A follows from seed and round (our reading: the paper
    draws it anew at each client) and is not sent. Weights and scaling enter once, on the right factor.
    """

    name = "flora"
    summary = "everybody's factors stacked into the base, a fresh adapter each round: exact for any ranks"
    source = "arXiv 2409.05976"
    traits = Traits(
        family=Family.SUM_PRODUCT,
        exact=True,
        changes_base=True,
        any_scaling=True,
        scales_by_module=True,
        cost_down="min(R*(d_out + d_in), d_out*d_in)",
    )

    def plan(self, round_number: int) -> Plan:
        return Plan(down=frozenset({"magnitude", "head"}))

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        step, fresh = {}, {}
        for module in updates.modules:
            stacked = updates.mean_product(module).factors()
            step[module] = Factors(stacked.B, state.scaling_of(module) * stacked.A)
            fresh[module] = begun_anew(state, module)
        return state.with_factors(fresh).with_base(step)


def begun_anew(state: ServerState, module: str) -> Factors:
    """B = 0 and A drawn by (seed, round, module) as at the start."""
    adapter = state.adapter
    generator = torch_generator(state.seed, "fresh", state.round + 1, adapter.modules.index(module))
    kind = adapter.kinds.get(module, "linear")
    before = adapter.factors[module]
    drawn = fresh_factors(before.shape, before.rank, kind, generator)
    return Factors(drawn.B.to(before.B.device), drawn.A.to(before.A.device))
