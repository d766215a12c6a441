"""FedRot-LoRA: clients' factors are turned towards the last broadcast before they are averaged."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fedlora.adapter import Factors
from fedlora.adapter.factors import mean_factors
from fedlora.adapter.updates import Updates
from fedlora.sections import Section
from fedlora.strategies.base import Family, ServerState, Strategy, Traits


class FedRotLoRA(Strategy):
    """`B̄, Ā` of `(B_uR_u, R_uᵀA_u)`: a rotation leaves a client's product as it is, and lets the means meet.

    arXiv 2602.23638. The rotation is the orthogonal Procrustes solution against the last broadcast: in even rounds for
    A, in odd rounds from the third for B, none in the first; then blended with the identity and made orthogonal again.
    Readings: the server, which knows the reference, turns the factors (the paper's clients do, to the same result);
    determinant +1 is enforced; where the blend is singular the rotation itself is taken.
    """

    name = "fedrot-lora"
    summary = "factors rotated towards the last broadcast, then averaged: products unchanged, means closer"
    source = "arXiv 2602.23638"
    traits = Traits(
        family=Family.PRODUCT_SUM,
        exact=False,
        one_rank="a rotation mixes rank indices, so clients of several ranks would not be comparable after it",
    )
    options: Options

    class Options(Section):
        strength: float = Field(0.5, ge=0, le=1)
        """Share λ of the rotation that is carried out; 0 is `fedit`, 1 the full rotation."""

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        strength = self.options.strength
        new = {}
        for module in updates.modules:
            reference = state.adapter.factors[module].to_double()
            turned = (turn(pair.to_double(), reference, state.round, strength) for pair in updates.factors(module))
            new[module] = mean_factors(turned, updates.weights)
        return state.with_factors(new)


def turn(own: Factors, reference: Factors, rounds_done: int, strength: float) -> Factors:
    """A client's factors `(B R, RᵀA)`, turned towards the reference's A (after an odd number of rounds) or B."""
    if rounds_done == 0:
        return own
    overlap = own.A @ reference.A.T if rounds_done % 2 else own.B.T @ reference.B
    rotation = soft_rotation(overlap, strength)
    return Factors(own.B @ rotation, rotation.T @ own.A)


def soft_rotation(overlap: Tensor, strength: float) -> Tensor:
    """The rotation (r × r, determinant +1) that maximises `tr(Rᵀ overlap)`, blended with the identity."""
    left, _, right = torch.linalg.svd(overlap)
    signs = overlap.new_ones(len(overlap))
    signs[-1] = torch.linalg.det(left @ right).sign()
    full: Tensor = (left * signs) @ right
    blend = (1 - strength) * torch.eye(len(overlap), dtype=overlap.dtype, device=overlap.device) + strength * full
    u, values, vh = torch.linalg.svd(blend)
    found: Tensor = u @ vh
    return found if values[-1] > 1e-8 else full
