"""HetLoRA: zero-padding weighted by the size of the update, with clients that prune their own rank."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

import torch
from pydantic import Field
from torch import Tensor

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.factors import mean_factors, product_norm
from fedlora.adapter.updates import Updates
from fedlora.sections import Section
from fedlora.strategies.base import Family, ServerState, Strategy, Traits


class HetLoRA(Strategy):
    """Padded with zeros, weighted by `‖B_uA_u‖_F` per module; rank self-pruning at the client. arXiv 2401.06432.

    Client: the loss gets `penalty · ‖B[:, k:]‖·‖A[k:]‖` summed over modules, with k = ⌊keep·r_u⌋; if that tail is
    smaller after training than before, the client goes on at rank k. Readings: the norms replace the example counts, a
    client whose weight is zero stays out, and where nothing was learned the clients' own weights are used.
    """

    name = "hetlora"
    summary = "zero-padding weighted by the norm of each update; clients prune their own rank"
    source = "arXiv 2401.06432"
    traits = Traits(family=Family.PRODUCT_SUM, exact=False)
    options: Options

    class Options(Section):
        keep: float = Field(0.99, gt=0, le=1)
        """Share γ of its rank to which a client prunes itself (rounded down, at least 1); 1 never prunes."""
        penalty: float = Field(5e-3, ge=0)
        """Weight λ of the tail's norm in the clients' loss."""

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        factors, diagnostics = {}, {}
        for module in updates.modules:
            weights = sparsity_weights(updates, module)
            factors[module] = mean_factors(updates.factors(module, state.rank(module)), weights)
            diagnostics[module] = {"p": weights}
        return state.with_factors(factors, diagnostics)

    def penalty(self, factors: Mapping[str, Factors], start: Adapter) -> Tensor | None:
        if not self.options.penalty or self._kept(start.rank) == start.rank:
            return None
        return self.options.penalty * self._tail(factors, start.rank)

    def after_training(self, start: Adapter, trained: Adapter) -> Adapter:
        rank = start.rank
        pruned = float(self._tail(trained.factors, rank)) < float(self._tail(start.factors, rank))
        return trained.cut(self._kept(rank)) if pruned else trained

    def _kept(self, rank: int) -> int:
        # In decimals, as the share was typed: in binary 0.58 · 50 is 28.999…, and would be cut to 28.
        return max(1, int(Decimal(str(self.options.keep)) * rank))

    def _tail(self, factors: Mapping[str, Factors], rank: int) -> Tensor:
        """`Σ ‖B[:, k:r]‖·‖A[k:r]‖` over modules."""
        k = self._kept(rank)
        return torch.stack([pair.B[:, k:rank].norm() * pair.A[k:rank].norm() for pair in factors.values()]).sum()


def sparsity_weights(updates: Updates, module: str) -> Tensor:
    """`‖B_uA_u‖_F / Σ` (U, float64) over clients with a positive weight; their own weights where all norms are zero."""
    norms = updates.weights.new_tensor([product_norm(pair) for pair in updates.factors(module)])
    norms = torch.where(updates.weights > 0, norms, torch.zeros_like(norms))
    return norms / norms.sum() if norms.sum() > 0 else updates.weights
