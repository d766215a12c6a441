"""SVD: the best rank-r approximation of the mean product."""

from __future__ import annotations

from fedlora.adapter.updates import Updates
from fedlora.strategies.base import Family, ServerState, Strategy, Traits


class SVD(Strategy):
    """`Σ w_u B_uA_u` cut to rank r, split evenly: `B = U√S`, `A = √S Vᵀ` (sum-product).

    No rank-r broadcast is nearer to the mean product (Eckart–Young), so ρ equals its floor. Ranks are free: the indices
    are in the order of the singular values, so a client's first r_u are its optimum. Of large layers only the leading
    directions are computed, to ten digits of what is left out (`fedlora.adapter.leading`). Our reading;
    FlexLoRA (arXiv 2402.11505) is the same truncation with an uneven split.
    """

    name = "svd"
    summary = "mean of products cut to rank r: the smallest divergence that rank r allows"
    source = "our reading, after arXiv 2402.11505"
    traits = Traits(family=Family.SUM_PRODUCT, exact=False, in_svd_order=True, any_scaling=True)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        return state.with_factors(
            {m: updates.mean_product(m).leading(state.rank(m)).balanced() for m in updates.modules}
        )
