"""FedMomentum: the leading directions go on as adapter, the next into the base, the rest is dropped."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from fedlora.adapter import Factors
from fedlora.adapter.updates import Updates
from fedlora.sections import Section
from fedlora.strategies.base import Family, ServerState, Strategy
from fedlora.strategies.fedex_lora import FedExLoRA


class FedMomentum(Strategy):
    """The leading r directions of `Σ w_u B_uA_u` as adapter (`U√S`, `√SVᵀ`), the next ones into the base.

    arXiv 2603.08014. What is left once a share of the energy is kept is dropped. "Momentum" is what the adapter carries
    over; there is no buffer. Readings: merged every round, always r directions in the adapter, and the residual carries
    the scaling s (public code leaves it out). With a share of 1 it is `oracle`.
    """

    name = "fedmomentum"
    summary = "top r directions of the mean product as adapter, the next ones into the base, noise dropped"
    source = "arXiv 2603.08014"
    traits = replace(
        FedExLoRA.traits,
        family=Family.SUM_PRODUCT,
        exact=False,
        cost_down="r*(d_out + d_in) + min(max(R - r, 0)*(d_out + d_in), d_out*d_in)",
    )
    options: Options

    class Options(Section):
        energy: float = Field(0.9999, gt=0, le=1)
        """Share of the squared singular values that adapter and base update keep together."""

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        adapters, step = {}, {}
        for module in updates.modules:
            rank = state.rank(module)
            found = updates.mean_product(module).holding(self.options.energy, rank, rank)
            adapters[module] = found.first(rank).balanced()
            step[module] = Factors(found.U[:, rank:] * (state.scaling_of(module) * found.S[rank:]), found.Vh[rank:])
        return state.with_factors(adapters).with_base(step)
