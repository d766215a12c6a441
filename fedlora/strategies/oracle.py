"""Oracle: the control that loses nothing."""

from __future__ import annotations

import torch

from fedlora.adapter import Factors
from fedlora.adapter.updates import Updates
from fedlora.strategies.base import Family, ServerState, Strategy, Traits


class Oracle(Strategy):
    """The best low-rank part of the mean product as the adapter, all the rest folded into the base: ρ = 0.

    A control: what would be gained if nothing were lost between upload and broadcast. With mixed ranks the adapter
    carries what every client can hold (the lowest rank that took part); higher directions start from B = 0 beside the
    next singular vectors (our reading, so that it is exact for every client).
    """

    name = "oracle"
    summary = "control: the rank-r optimum as adapter, the rest of the mean product in the base; nothing is lost"
    source = "control"
    traits = Traits(
        family=Family.CONTROL,
        exact=True,
        changes_base=True,
        any_scaling=True,
        scales_by_module=True,
        cost_down="r*(d_out + d_in) + min((R - m)*(d_out + d_in), d_out*d_in)",
    )

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        lowest = min([*state.ranks.values(), state.adapter.rank])
        kept, step = {}, {}
        for module in updates.modules:
            rank = state.rank(module)
            own = min(lowest, rank)  # a module may have fewer indices than any client
            leading, step[module] = updates.mean_product(module).divided(rank, own, state.scaling_of(module))
            kept[module] = _cut_off(leading.balanced(), lowest, leading.Vh)
        return state.with_factors(kept).with_base(step)


def _cut_off(pair: Factors, rank: int, directions: torch.Tensor) -> Factors:
    """The product of the first `rank` indices; beyond them B = 0 and A the unit `directions`."""
    keep = torch.arange(pair.rank, device=pair.B.device) < rank
    return Factors(pair.B * keep, torch.where(keep[:, None], pair.A, directions))
