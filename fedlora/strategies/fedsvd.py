"""FedSVD: only B is trained; each round the product is factored anew with orthonormal A."""

from __future__ import annotations

from fedlora.adapter import Factors
from fedlora.adapter.factors import ProductSum
from fedlora.adapter.updates import Updates
from fedlora.strategies.base import ONLY_B, Family, Plan, ServerState, Strategy, Traits


class FedSVD(Strategy):
    """`B̄Â = U S Vᵀ`, then `B̂ = U S`, `Â = Vᵀ`: the product is unchanged, A's rows orthonormal.

    arXiv 2505.12805. A is frozen within a round, so the mean of B is exact. Its rows are ordered by what was learned,
    within the span of the random start, which they never leave. The SVD needs no d_out × d_in matrix. Our reading for
    clients of lower rank: they hold the first rows of Â (the largest directions), and their B counts as zero beyond.
    """

    name = "fedsvd"
    summary = "as ffa-lora, with A made orthonormal each round by the SVD of the product: exact"
    source = "arXiv 2505.12805"
    traits = Traits(
        family=Family.PRODUCT_SUM, exact=True, shares="A", in_svd_order=True, any_scaling=True, cost_up="r*d_out"
    )

    def plan(self, round_number: int) -> Plan:
        return Plan(trains=ONLY_B, up=ONLY_B)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        new = {}
        for module in updates.modules:
            rank = state.rank(module)
            product = Factors(updates.mean_b(module, rank), state.adapter.factors[module].A)
            new[module] = ProductSum.of([product], [1.0]).truncated(rank).on_b()
        return state.with_factors(new)
