"""RAFLoRA: the mean of products, taken per rank index over the clients that hold it."""

from __future__ import annotations

import torch

from fedlora.adapter import Factors
from fedlora.adapter.factors import ProductSum
from fedlora.adapter.updates import Updates
from fedlora.strategies.base import Family, ServerState, Strategy, Traits
from fedlora.strategies.replication import ownership


class RAFLoRA(Strategy):
    """`Σ_j Σ_{u: r_u>j} (w_u/Σ_{v: r_v>j} w_v) B_u[:,j]A_u[j]`, then the SVD at the highest rank. arXiv 2602.13486.

    The paper partitions the ranks at the levels that clients have; index by index is the same. The sum-product sibling
    of `replication`: with plain weights the energy of the higher directions decays round by round, because low-rank
    clients dilute it. With equal ranks it is `svd`. Readings: balanced split, and an index that no sampled client holds
    keeps its previous product. With several ranks it aims at another matrix than W*, so ρ does not vanish with rank.
    """

    name = "raflora"
    summary = "mean of products, each rank index over the clients that hold it, cut to rank r"
    source = "arXiv 2602.13486"
    traits = Traits(family=Family.SUM_PRODUCT, exact=False, in_svd_order=True, any_scaling=True)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        return state.with_factors(
            {m: owners_product(state, updates, m).leading(state.rank(m)).balanced() for m in updates.modules}
        )


def owners_product(state: ServerState, updates: Updates, module: str) -> ProductSum:
    """The sum of products with every rank index averaged over its owners alone."""
    before = state.adapter.factors[module]
    weights = updates.weights.to(before.B.device)
    owned = ownership([pair.rank for pair in updates.factors(module)], weights, before.rank)
    missing = owned == 0
    total = ProductSum(before.shape)
    if missing.any():
        total.add(1.0, Factors(before.B[:, missing], before.A[missing]))
    share = torch.where(owned > 0, owned, torch.ones_like(owned))
    for weight, pair in zip(updates.weights.tolist(), updates.factors(module), strict=True):
        total.add(weight, Factors(pair.B.double() / share[: pair.rank], pair.A))
    return total
