"""FedEx-LoRA: the means as adapter, what they miss into the base."""

from __future__ import annotations

from fedlora.adapter import Factors
from fedlora.adapter.factors import ProductSum
from fedlora.adapter.updates import Updates
from fedlora.strategies.base import Family, ServerState, Strategy, Traits


class FedExLoRA(Strategy):
    """`B̄, Ā` as in FedIT, and the residual `s·(Σ w_u B_uA_u − B̄Ā)` added to the base: exact. arXiv 2410.09432.

    The residual travels as factors of width (U−1)r, by the centred identity
    `Σ_{u<U} w_u (B_u − B̄)(A_u − A_U)`, or dense where that is smaller.
    """

    name = "fedex-lora"
    summary = "means as in fedit, and what they miss added to the base: exact, the residual travels down"
    source = "arXiv 2410.09432"
    traits = Traits(
        family=Family.PRODUCT_SUM,
        exact=True,
        changes_base=True,
        any_scaling=True,
        scales_by_module=True,
        one_rank="the residual is one for all, but clients of lower rank would hold another adapter; "
        "use flora or oracle",
        cost_down="r*(d_out + d_in) + min((R - r)*(d_out + d_in), d_out*d_in)",
    )

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        means, step = {}, {}
        for module in updates.modules:
            means[module] = updates.mean_factors(module)
            step[module] = residual(updates, module, means[module], state.scaling_of(module))
        return state.with_factors(means).with_base(step)


def residual(updates: Updates, module: str, means: Factors, scaling: float) -> Factors:
    """`s·(Σ w_u B_uA_u − B̄Ā)` as left (d_out × (U−1)r) and right factors, in float64; dense beside an identity where
    (U−1)r is not below min(d_out, d_in)."""
    uploaded = updates.factors(module)
    last = uploaded[-1].A.double()
    total = ProductSum(means.shape)
    for weight, pair in zip(updates.weights.tolist()[:-1], uploaded[:-1], strict=True):
        total.add(scaling * weight, Factors(pair.B.double() - means.B, pair.A.double() - last))
    return total.factors() if len(uploaded) > 1 else Factors(means.B[:, :0], means.A[:0])
