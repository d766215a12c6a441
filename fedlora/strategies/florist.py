"""FLoRIST: the stack of everybody's factors, cut where a share of its energy is reached, merged into the base."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from fedlora.adapter import Factors
from fedlora.adapter.updates import Updates
from fedlora.sections import Section
from fedlora.strategies.base import ServerState
from fedlora.strategies.flora import FLoRA, begun_anew


class FLoRIST(FLoRA):
    """`Σ w_u B_uA_u = U S Vᵀ`; the fewest directions that hold a share τ of the energy are merged into the base, then
    B = 0 and a fresh random A. arXiv 2506.09199.

    As `flora`, with a shorter stack: ρ is at most √(1−τ), and with τ = 1 it is `flora`. Any ranks. The fresh A follows
    from seed and round (our reading, as for `flora`).
    """

    name = "florist"
    summary = "as flora, with the stack cut where a share of its energy is reached: fewer bytes down"
    source = "arXiv 2506.09199"
    traits = replace(FLoRA.traits, exact=False)
    options: Options

    class Options(Section):
        energy: float = Field(0.9, gt=0, le=1)
        """Share τ of the squared singular values that is kept, per module."""

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        fresh, step = {}, {}
        for module in updates.modules:
            kept = updates.mean_product(module).holding(self.options.energy, state.rank(module))
            step[module] = Factors(kept.U * (state.scaling_of(module) * kept.S), kept.Vh)
            fresh[module] = begun_anew(state, module)
        return state.with_factors(fresh).with_base(step)
