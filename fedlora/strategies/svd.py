"""SVD: the best rank-r approximation of the mean product."""

from __future__ import annotations

from fedlora.factors import truncated_svd
from fedlora.strategies.base import Family, ServerState, Strategy
from fedlora.updates import Updates


class SVD(Strategy):
    """`Σ w_u B_uA_u` cut to rank r, split evenly: `B = U√S`, `A = √S Vᵀ` (sum-product).

    No rank-r broadcast is nearer to the mean product (Eckart–Young), so ρ equals its floor. Our reading, ALGORITHMS §4;
    FlexLoRA (arXiv 2402.11505) is the same truncation with an uneven split.
    """

    name, family, exact = "svd", Family.SUM_PRODUCT, False
    summary = "mean of products cut to rank r: the smallest divergence that rank r allows"
    source = "our reading, after arXiv 2402.11505"

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        return state.with_factors(
            {
                module: truncated_svd(
                    updates.factors(module), updates.weights, state.adapter.factors[module].rank
                ).balanced()
                for module in updates.modules
            }
        )
