"""RAVAN: several small trained matrices between fixed orthonormal factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pydantic import Field
from torch import Tensor

from fedlora.sections import Section
from fedlora.strategies.base import ServerState
from fedlora.strategies.core import CoreStrategy, orthonormal, with_fixed


class RAVAN(CoreStrategy):
    """`s·Σ_i g_i B_iH_iA_i` over h heads of rank r/h; B_i, A_i fixed and shared, H_i and the factors g_i trained.

    arXiv 2506.05568. `g_iH_i` is uploaded, its mean is exact, and g_i starts the next round at one. With the numbers
    of one r' × r' matrix, h heads reach the rank √h·r'. Readings: `lora.rank` is that of all heads together, the
    factors are orthonormal (the paper's Gram–Schmidt start) and all clients train all heads.
    """

    name = "ravan"
    summary = "h small matrices between fixed orthonormal factors: exact, r²/h numbers at rank r"
    source = "arXiv 2506.05568"
    traits = replace(CoreStrategy.traits, cost_up="r*r/h", cost_down="r*r/h")
    options: Options

    class Options(Section):
        heads: int = Field(4, ge=1)
        """Heads h among which the rank is divided."""

    def refuses_rank(self, rank: int) -> str | None:
        if rank % self.options.heads == 0:
            return None
        return f"it cannot be divided among strategy_options.heads={self.options.heads}; choose a multiple of it"

    def begin(self, state: ServerState, weight: Callable[[str], Tensor]) -> ServerState:
        fixed = {module: orthonormal(state, position) for position, module in enumerate(state.adapter.modules)}
        return with_fixed(state, fixed, self.options.heads)
