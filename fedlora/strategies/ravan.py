"""RAVAN: several small trained matrices between fixed orthonormal factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from pydantic import Field
from torch import Tensor

from fedlora.config import Section
from fedlora.strategies.base import Family, Plan, ServerState, Strategy
from fedlora.strategies.fed_sb import CORE, orthonormal
from fedlora.updates import Updates


class RAVAN(Strategy):
    """`s·Σ_i g_i B_iH_iA_i` over h heads of rank r/h; B_i, A_i fixed and shared, H_i and the factors g_i trained.

    arXiv 2506.05568. `g_iH_i` is uploaded, its mean is exact, and g_i starts the next round at one. With the numbers
    of one r' × r' matrix, h heads reach the rank √h·r'. Readings: `lora.rank` is that of all heads together, the
    factors are orthonormal (the paper's Gram–Schmidt start) and all clients train all heads.
    """

    name, family, exact = "ravan", Family.PRODUCT_SUM, True
    summary = "h small matrices between fixed orthonormal factors: exact, r²/h numbers at rank r"
    source = "arXiv 2506.05568"
    cost_up = cost_down = "r*r/h"
    keeps_gauge = trains_core = True
    one_rank = "clients of another rank would have other fixed factors"

    class Options(Section):
        heads: int = Field(4, ge=1)
        """Heads h among which the rank is divided."""

    @property
    def _heads(self) -> int:
        return cast(RAVAN.Options, self.options).heads

    def refuses_rank(self, rank: int) -> str | None:
        if rank % self._heads == 0:
            return None
        return f"it cannot be divided among strategy_options.heads={self._heads}; choose a multiple of it"

    def plan(self, round_number: int) -> Plan:
        return Plan(trains=CORE, up=CORE, down=CORE)

    def begin(self, state: ServerState, weight: Callable[[str], Tensor]) -> ServerState:
        modules = state.adapter.modules
        fixed = {module: orthonormal(state, position) for position, module in enumerate(modules)}
        h = self._heads
        cores = {m: torch.zeros(h, pair.rank // h, pair.rank // h) for m, pair in fixed.items()}
        return replace(state, adapter=state.adapter.with_factors(fixed)).with_cores(cores)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        return state.with_cores(updates.mean_cores())
