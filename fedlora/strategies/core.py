"""What strategies with a trained core between fixed factors share: only the core and the head train and travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from fedlora.adapter import Factors, Part
from fedlora.adapter.updates import Updates
from fedlora.seeds import torch_generator
from fedlora.strategies.base import Family, Plan, ServerState, Strategy, Traits

_CORE: frozenset[Part] = frozenset({"core", "head"})


class CoreStrategy(Strategy):
    """The update is `s·B C A` with B, A fixed and shared, so that the mean of C is exact."""

    traits = Traits(
        family=Family.PRODUCT_SUM,
        exact=True,
        keeps_gauge=True,
        trains_core=True,
        one_rank="clients of another rank would have other fixed factors",
    )

    def plan(self, round_number: int) -> Plan:
        return Plan(trains=_CORE, up=_CORE, down=_CORE)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        return state.with_cores(updates.mean_cores())


def with_fixed(state: ServerState, fixed: Mapping[str, Factors], heads: int | None = None) -> ServerState:
    """The state with these factors and cores of zero between them: r × r, or the diagonal blocks of `heads`."""
    cores = {}
    for module, pair in fixed.items():
        side = pair.rank // (heads or 1)
        cores[module] = torch.zeros(side, side) if heads is None else torch.zeros(heads, side, side)
    return replace(state, adapter=state.adapter.with_factors(fixed)).with_cores(cores)


def orthonormal(state: ServerState, position: int) -> Factors:
    """B with orthonormal columns and A with orthonormal rows, drawn by (seed, module)."""
    module = state.adapter.modules[position]
    (d_out, d_in), rank = state.adapter.factors[module].shape, state.rank(module)
    generator = torch_generator(state.seed, "fixed factors", 0, position)
    left = torch.linalg.qr(torch.randn(d_out, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(d_in, rank, generator=generator)).Q
    return Factors(left, right.T)
