"""Replication padding: every rank index is averaged over the clients that hold it."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.adapter import Factors
from fedlora.adapter.factors import mean_factors
from fedlora.adapter.updates import Updates
from fedlora.strategies.base import Family, ServerState, Strategy, Traits


class Replication(Strategy):
    """Rows of A and columns of B at index j are the weighted mean over their owners, the clients with r_u > j.

    arXiv 2406.17477: the same as filling low-rank clients up with the high-rank clients' mean before averaging. If no
    owner took part, the previous global value of j stays (our reading). With equal ranks it is FedIT.
    """

    name = "replication"
    summary = "every rank index is averaged over the clients that hold it: nothing is diluted"
    source = "arXiv 2406.17477"
    traits = Traits(family=Family.PRODUCT_SUM, exact=False)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        return state.with_factors({m: owners_mean(state, updates, m) for m in updates.modules})


def owners_mean(state: ServerState, updates: Updates, module: str) -> Factors:
    """`B̄, Ā` (float64) with every rank index averaged over its owners alone."""
    before = state.adapter.factors[module].to_double()
    weights = updates.weights.to(before.B.device)
    owned = ownership([pair.rank for pair in updates.factors(module)], weights, before.rank)
    sums = mean_factors(updates.factors(module, before.rank), updates.weights)
    share = torch.where(owned > 0, owned, torch.ones_like(owned))
    kept = owned > 0
    return Factors(
        torch.where(kept, sums.B / share, before.B), torch.where(kept[:, None], sums.A / share[:, None], before.A)
    )


def ownership(ranks: list[int], weights: Tensor, rank: int) -> Tensor:
    """The summed weight (rank, float64) of the clients that hold each rank index."""
    indices = torch.arange(rank, device=weights.device)
    held = indices[None, :] < indices.new_tensor(ranks)[:, None]
    return weights @ held.to(torch.float64)
