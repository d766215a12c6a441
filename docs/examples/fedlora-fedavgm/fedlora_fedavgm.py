"""Server momentum on the factors: the mean of each factor is a step, and steps are carried on."""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from fedlora.adapter import Factors
from fedlora.adapter.updates import Updates
from fedlora.config import Section
from fedlora.strategies.base import Family, ServerState, Strategy, Traits


class FedAvgM(Strategy):
    """`V ← β·V + (mean − global)`, then `global ← global + V`, for B and A apart. arXiv 1909.06335, on factors."""

    name = "fedavgm"
    summary = "fedit with momentum on the server"
    source = "arXiv 1909.06335"
    traits = Traits(family=Family.PRODUCT_SUM, exact=False, one_rank="the mean is fedit's")
    options: Options

    class Options(Section):
        momentum: float = Field(0.5, ge=0, lt=1)
        """Share β of the last step that is carried on; 0 is `fedit`."""

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        factors, steps = {}, {}
        for module in updates.modules:
            mean, before = updates.mean_factors(module), state.adapter.factors[module].to_double()
            moved = {}
            for part, target, start in (("B", mean.B, before.B), ("A", mean.A, before.A)):
                last = state.memory.get(f"{module}/{part}", torch.zeros_like(start))
                step = self.options.momentum * last + (target - start)
                steps[f"{module}/{part}"], moved[part] = step, start + step
            factors[module] = Factors(moved["B"], moved["A"])
        return replace(state.with_factors(factors), memory=steps)
