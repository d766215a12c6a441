"""FLoRA-NA: nearly accurate aggregation with one weight per client and factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from pydantic import Field
from torch import Tensor

from fedlora.adapter import Factors
from fedlora.config import Section
from fedlora.factors import mean, mean_factors
from fedlora.strategies.base import Family, ServerState, Strategy
from fedlora.updates import Updates


class FLoRANA(Strategy):
    """`B̂ = Σ p_u B_u`, `Â = Σ q_u A_u` with p, q that bring `B̂Â` nearest to `Σ w_u B_uA_u`. arXiv 2509.26399.

    Solved per module by alternating least squares on r × r Gram blocks (ALGORITHMS §4.1, our reading of the paper's
    minimisation). It starts at p = q = w and never rises, so ρ is at most FedIT's by construction.
    """

    name, family, exact = "flora-na", Family.PRODUCT_SUM, False
    summary = "means with fitted weights, as near to the mean of products as one weight per client and factor allows"
    source = "arXiv 2509.26399"

    class Options(Section):
        max_sweeps: int = Field(100, ge=1)
        """Most alternating sweeps per module."""
        tolerance: float = Field(1e-10, ge=0)
        """Stop when a sweep lowers the objective by less than this share of it."""

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        options = cast(FLoRANA.Options, self.options)
        factors, diagnostics = {}, {}
        for module in updates.modules:
            uploaded = updates.factors(module)
            fit = solve(uploaded, updates.weights, options.max_sweeps, options.tolerance)
            factors[module] = _combine(uploaded, updates.weights, fit)
            diagnostics[module] = {"p": fit.p, "q": fit.q, "objective": fit.objective}
        return state.with_factors(factors, diagnostics)


@dataclass(frozen=True)
class Fit:
    """Mixing weights `p`, `q` (U) and the objective `‖B̂Â − Σ w BA‖²` at the start and after each sweep."""

    p: Tensor
    q: Tensor
    objective: Tensor


@dataclass(frozen=True)
class Grams:
    """`B[u,v] = B_uᵀB_v` and `A[u,v] = A_uA_vᵀ`, each (U × U × r × r): all that the objective depends on."""

    B: Tensor
    A: Tensor
    weights: Tensor

    @classmethod
    def of(cls, factors: Sequence[Factors], weights: Tensor) -> Grams:
        b = torch.stack([pair.B.double() for pair in factors])
        a = torch.stack([pair.A.double() for pair in factors])
        return cls(torch.einsum("uir,vis->uvrs", b, b), torch.einsum("uri,vsi->uvrs", a, a), weights.double())

    def swapped(self) -> Grams:
        """The same problem with the roles of the factors exchanged: `(B̂Â)ᵀ = ÂᵀB̂ᵀ`."""
        return Grams(self.A, self.B, self.weights)

    def system(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Normal equations `H p = h` for p at fixed q: `H[u,s] = ⟨B_uÂ, B_sÂ⟩`, `h[u] = ⟨B_uÂ, Σ w_t B_tA_t⟩`."""
        hat_a = torch.einsum("v,vtrs->trs", q, self.A)
        left = torch.einsum("usij,ij->us", self.B, torch.einsum("t,tij->ij", q, hat_a))
        right = torch.einsum("utij,tij,t->u", self.B, hat_a, self.weights)
        return left, right

    def target(self) -> Tensor:
        """`‖Σ w_u B_uA_u‖²`."""
        return torch.einsum("u,v,uvij,uvij->", self.weights, self.weights, self.B, self.A)


def solve(factors: Sequence[Factors], weights: Tensor, max_sweeps: int = 100, tolerance: float = 1e-10) -> Fit:
    """Mixing weights for one module's uploads by alternating least squares in Gram space.

    Args:
        factors: the clients' factors, equal ranks.
        weights: (U), the weights of the mean product that is approached.
        max_sweeps: upper bound on sweeps (one sweep fits p, then q).
        tolerance: relative decrease of the objective below which it stops.

    A step that does not lower the objective (rounding at a singular system) is not taken.
    """
    grams = Grams.of(factors, weights)
    swapped, target = grams.swapped(), grams.target()
    p = q = weights.double()
    objective = [_objective(grams, p, q, target)]
    for _ in range(max_sweeps):
        p_new = _least_squares(*grams.system(q))
        q_new = _least_squares(*swapped.system(p_new))
        value = _objective(grams, p_new, q_new, target)
        if value >= objective[-1]:
            break
        p, q = p_new, q_new
        objective.append(value)
        if objective[-2] - value <= tolerance * objective[-2]:
            break
    return Fit(p, q, torch.tensor(objective, dtype=torch.float64))


def _objective(grams: Grams, p: Tensor, q: Tensor, target: Tensor) -> float:
    left, right = grams.system(q)
    return max(float(p @ left @ p - 2 * p @ right + target), 0.0)


def _least_squares(left: Tensor, right: Tensor) -> Tensor:
    """Minimum-norm solution: the system is singular when clients coincide."""
    solution: Tensor = torch.linalg.lstsq(left, right[:, None], rcond=1e-12, driver="gelsd").solution
    return solution[:, 0]


def _combine(factors: Sequence[Factors], weights: Tensor, fit: Fit) -> Factors:
    """`B̂, Â` in the gauge of the means: the split `(cB̂, Â/c)` with `‖B̂‖/‖Â‖ = ‖B̄‖/‖Ā‖`."""
    hat = Factors(mean([pair.B for pair in factors], fit.p), mean([pair.A for pair in factors], fit.q))
    bar = mean_factors(factors, weights)
    ratio = (bar.B.norm() * hat.A.norm()) / (bar.A.norm() * hat.B.norm())
    gauge = ratio.sqrt() if torch.isfinite(ratio) and ratio > 0 else torch.ones(())
    return Factors(hat.B * gauge, hat.A / gauge)
