"""LoRA-FAIR: the mean of A, and a B corrected towards the mean product."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fedlora.adapter import Factors
from fedlora.adapter.updates import Updates
from fedlora.sections import Section
from fedlora.strategies.base import Family, ServerState, Strategy, Traits


class LoRAFAIR(Strategy):
    """`Ā`, and `B' = B̄ + ΔB` with `ΔB = (W*/s − B̄Ā)Āᵀ(ĀĀᵀ + λI)⁻¹`, `λ = λ0·tr(ĀĀᵀ)/r`. arXiv 2411.14961.

    Our reading: the closed form of the paper's regularised fit in the Frobenius norm. ΔB = 0 is always
    possible, so ρ is at most FedIT's. Our reading for mixed ranks: the means are those of zero-padded factors.
    """

    name = "lora-fair"
    summary = "mean of A, and B corrected by regularised least squares towards the mean product"
    source = "arXiv 2411.14961"
    traits = Traits(family=Family.PRODUCT_SUM, exact=False)
    options: Options

    class Options(Section):
        ridge: float = Field(0.01, ge=0)
        """λ0: strength of the regularisation, relative to the mean eigenvalue of ĀĀᵀ."""

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        new = {}
        for module in updates.modules:
            means = updates.mean_factors(module, state.rank(module))
            missed = updates.mean_product(module).add(-1.0, means).times(means.A.T)
            new[module] = Factors(means.B + correction(missed, means.A, self.options.ridge), means.A)
        return state.with_factors(new)


def correction(missed: Tensor, A: Tensor, ridge: float) -> Tensor:
    """ΔB (d_out × r) for `missed = (W*/s − B̄Ā)Āᵀ`; zero where Ā is."""
    gram = A @ A.T
    trace = float(gram.trace())
    if trace == 0:
        return torch.zeros_like(missed)
    damped = gram + ridge * trace / A.shape[0] * torch.eye(A.shape[0], dtype=gram.dtype, device=gram.device)
    solution: Tensor = missed @ torch.linalg.pinv(damped, hermitian=True, rtol=1e-12)
    return solution
