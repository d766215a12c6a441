"""Fed-SB: only an r × r matrix between two fixed factors is trained and sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from fedlora.adapter import Factors, Part
from fedlora.config import Section
from fedlora.seeds import torch_generator
from fedlora.strategies.base import Family, Plan, ServerState, Strategy
from fedlora.updates import Updates

CORE: frozenset[Part] = frozenset({"core", "head"})


class FedSB(Strategy):
    """The update is `s·B C A` with B, A fixed and shared; the mean of C is exact. arXiv 2502.15436.

    Reading: the paper finds B and A from a gradient on pooled data, which no one has in a federation; here they are the
    leading singular directions of the base weight (its LoRA-XS variant), or random orthonormal ones. Both follow from
    what every client has, so they are never sent; C starts at zero, so training starts at the base model.
    """

    name, family, exact = "fed-sb", Family.PRODUCT_SUM, True
    summary = "an r × r matrix between fixed factors is all that is trained and sent: exact, r² numbers"
    source = "arXiv 2502.15436"
    cost_up = cost_down = "r*r"
    keeps_gauge = trains_core = True
    one_rank = "clients of another rank would have other fixed factors"

    class Options(Section):
        start: Literal["base", "random"] = "base"
        """Fixed factors: the leading singular directions of the base weight, or random orthonormal ones by seed."""

    def plan(self, round_number: int) -> Plan:
        return Plan(trains=CORE, up=CORE, down=CORE)

    def begin(self, state: ServerState, weight: Callable[[str], Tensor]) -> ServerState:
        random = cast(FedSB.Options, self.options).start == "random"
        fixed = {}
        for position, module in enumerate(state.adapter.modules):
            rank = state.rank(module)
            fixed[module] = orthonormal(state, position) if random else _leading(weight(module), rank)
        cores = {module: torch.zeros(pair.rank, pair.rank) for module, pair in fixed.items()}
        return replace(state, adapter=state.adapter.with_factors(fixed)).with_cores(cores)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        return state.with_cores(updates.mean_cores())


def _leading(weight: Tensor, rank: int) -> Factors:
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return Factors(left[:, :rank], right[:rank]).to(torch.float32)


def orthonormal(state: ServerState, position: int) -> Factors:
    """B with orthonormal columns and A with orthonormal rows, drawn by (seed, module)."""
    module = state.adapter.modules[position]
    (d_out, d_in), rank = state.adapter.factors[module].shape, state.rank(module)
    generator = torch_generator(state.seed, "fixed factors", 0, position)
    left = torch.linalg.qr(torch.randn(d_out, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(d_in, rank, generator=generator)).Q
    return Factors(left, right.T)
