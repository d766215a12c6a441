"""FlexLoRA: the mean of products, cut to each client's rank."""

from __future__ import annotations

from fedlora.adapter.updates import Updates
from fedlora.strategies.base import Family, ServerState, Strategy, Traits


class FlexLoRA(Strategy):
    """`Σ w_u B_uA_u = U S Vᵀ`; client u gets `B = U_r S_r`, `A = V_rᵀ` at its own rank (sum-product). arXiv 2402.11505.

    The scaling s is not in the product that is decomposed, so it is not divided out either: `s·B·A` is W*, truncated.
    """

    name = "flexlora"
    summary = "mean of products cut to each client's rank, its size on B and A orthonormal"
    source = "arXiv 2402.11505"
    traits = Traits(family=Family.SUM_PRODUCT, exact=False, in_svd_order=True, any_scaling=True)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        return state.with_factors({m: updates.mean_product(m).leading(state.rank(m)).on_b() for m in updates.modules})
