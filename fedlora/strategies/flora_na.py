"""FLoRA-NA: nearly accurate aggregation with one weight per client and factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedlora.adapter import Factors
from fedlora.adapter.factors import mean, mean_factors
from fedlora.adapter.updates import Updates
from fedlora.sections import Section
from fedlora.strategies.base import Family, ServerState, Strategy, Traits
from fedlora.strategies.simplex import minimise_on_simplex, project_to_simplex


class FLoRANA(Strategy):
    """`B̂ = Σ p_u B_u`, `Â = Σ q_u A_u` with p, q that bring `B̂Â` nearest to `Σ w_u B_uA_u`. arXiv 2509.26399.

    Solved per module by alternating least squares on r × r Gram blocks (our reading of the paper's minimisation). It
    starts at p = q = w and never rises, so ρ is at most FedIT's by construction, under every option.
    Our reading for clients of several ranks: their factors are padded with zeros, and p, q fit the padded product.
    """

    name = "flora-na"
    summary = "means with fitted weights, as near to the mean of products as one weight per client and factor allows"
    source = "arXiv 2509.26399"
    traits = Traits(family=Family.PRODUCT_SUM, exact=False)
    options: Options

    class Options(Section):
        solver: Literal["als", "adam"] = "als"
        """`als`: alternating least squares; `adam`: gradient descent, as the paper's text has it."""
        max_sweeps: int = Field(100, ge=1)
        """Most alternating sweeps (or gradient steps) per module."""
        tolerance: float = Field(1e-10, ge=0)
        """Stop when a sweep lowers the objective by less than this share of it (`als`)."""
        shared: bool = False
        """One p and q for all modules instead of one for each."""
        ridge: float = Field(0.0, ge=0)
        """Strength, relative to the problem's own curvature, with which p and q are drawn to the clients' weights."""
        simplex: bool = False
        """Keep p and q non-negative with sum one, as weights of a mean are."""

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        uploaded = {m: list(updates.factors(m, state.rank(m))) for m in updates.modules}
        groups = [list(updates.modules)] if self.options.shared else [[module] for module in updates.modules]
        factors, diagnostics = {}, {}
        for group in groups:
            fit = solve([_in_common_units(state, m, uploaded[m]) for m in group], updates.weights, self.options)
            for module in group:
                factors[module] = _combine(uploaded[module], updates.weights, fit)
                diagnostics[module] = {"p": fit.p, "q": fit.q, "objective": fit.objective}
        return state.with_factors(factors, diagnostics)


def _in_common_units(state: ServerState, module: str, uploaded: Sequence[Factors]) -> Sequence[Factors]:
    """Factors whose products compare with those of other modules: a module's weight in a common objective is s²."""
    ratio = state.scaling_of(module) / state.scaling
    return uploaded if ratio == 1 else [Factors(ratio * pair.B.double(), pair.A) for pair in uploaded]


@dataclass(frozen=True)
class Fit:
    """Mixing weights `p`, `q` (U) and the objective at the start and after each step that was taken: the sum over
    modules of `‖B̂Â − Σ w BA‖²`, with the ridge's terms."""

    p: Tensor
    q: Tensor
    objective: Tensor


@dataclass(frozen=True)
class Grams:
    """`B[u,v] = B_uᵀB_v` and `A[u,v] = A_uA_vᵀ`, each (U × U × r × r): all that a module's objective depends on."""

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

    def target(self) -> float:
        """`‖Σ w_u B_uA_u‖²`."""
        return float(torch.einsum("u,v,uvij,uvij->", self.weights, self.weights, self.B, self.A))


class Problem:
    """The objective of p and q over one or several modules: `Σ ‖B̂Â − Σ w BA‖² + λ_p‖p − w‖² + λ_q‖q − w‖²`."""

    def __init__(self, modules: Sequence[Sequence[Factors]], weights: Tensor, ridge: float) -> None:
        self.w = weights.double()
        self._for_p = [Grams.of(factors, self.w) for factors in modules]
        self._for_q = [grams.swapped() for grams in self._for_p]
        self._target = sum(grams.target() for grams in self._for_p)
        self._ridge_p, self._ridge_q = (
            ridge * float(_sum_systems(grams, self.w)[0].diagonal().mean()) for grams in (self._for_p, self._for_q)
        )

    def system_p(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """`H p = h` whose least-squares solution is the best p at this q."""
        return self._pulled(_sum_systems(self._for_p, q), self._ridge_p)

    def system_q(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """`H q = h` whose least-squares solution is the best q at this p."""
        return self._pulled(_sum_systems(self._for_q, p), self._ridge_q)

    def _pulled(self, system: tuple[Tensor, Tensor], ridge: float) -> tuple[Tensor, Tensor]:
        left, right = system
        return left + ridge * torch.eye(len(right), dtype=left.dtype), right + ridge * self.w

    def value(self, p: Tensor, q: Tensor) -> float:
        left, right = _sum_systems(self._for_p, q)
        fit = max(float(p @ left @ p - 2 * p @ right) + self._target, 0.0)
        pull = self._ridge_p * (p - self.w).square().sum() + self._ridge_q * (q - self.w).square().sum()
        return fit + float(pull)


def _sum_systems(modules: Sequence[Grams], fixed: Tensor) -> tuple[Tensor, Tensor]:
    systems = [grams.system(fixed) for grams in modules]
    return torch.stack([left for left, _ in systems]).sum(0), torch.stack([right for _, right in systems]).sum(0)


def solve(modules: Sequence[Sequence[Factors]], weights: Tensor, options: FLoRANA.Options | None = None) -> Fit:
    """Mixing weights for the uploads of one module, or of several that share them.

    Args:
        modules: per module the clients' factors, of one rank.
        weights: (U), the weights of the mean product that is approached.
        options: solver, limits, ridge and constraint.

    What does not lower the objective is not taken, so it never rises from p = q = w.
    """
    chosen = options or FLoRANA.Options()
    problem = Problem(modules, weights, chosen.ridge)
    return _by_gradient(problem, chosen) if chosen.solver == "adam" else _by_turns(problem, chosen)


def _by_turns(problem: Problem, options: FLoRANA.Options) -> Fit:
    """Alternating least squares: one sweep fits p, then q."""
    p = q = problem.w
    objective = [problem.value(p, q)]
    for _ in range(options.max_sweeps):
        p_new = _best(*problem.system_p(q), p, options.simplex)
        q_new = _best(*problem.system_q(p_new), q, options.simplex)
        value = problem.value(p_new, q_new)
        if value >= objective[-1]:
            break
        p, q = p_new, q_new
        objective.append(value)
        if objective[-2] - value <= options.tolerance * objective[-2]:
            break
    return Fit(p, q, torch.tensor(objective, dtype=torch.float64))


def _best(left: Tensor, right: Tensor, start: Tensor, simplex: bool) -> Tensor:
    """The minimiser of `xᵀHx − 2xᵀh`, on the simplex or free (then of minimum norm: clients may coincide)."""
    if simplex:
        return minimise_on_simplex(left, right, start)
    solution: Tensor = torch.linalg.lstsq(left, right[:, None], rcond=1e-12, driver="gelsd").solution
    return solution[:, 0]


def _by_gradient(problem: Problem, options: FLoRANA.Options) -> Fit:
    """Adam on p and q together, in steps of a hundredth of an even weight; the best point that it passes is kept."""
    p, q = problem.w.clone(), problem.w.clone()
    optimizer = torch.optim.Adam([p, q], lr=0.01 / len(p))
    best = Fit(p.clone(), q.clone(), torch.tensor([problem.value(p, q)], dtype=torch.float64))
    for _ in range(options.max_sweeps):
        for x, (left, right) in ((p, problem.system_p(q)), (q, problem.system_q(p))):
            x.grad = 2 * (left @ x - right)
        optimizer.step()
        if options.simplex:
            for x in (p, q):
                x.copy_(project_to_simplex(x))
        value = problem.value(p, q)
        if value < float(best.objective[-1]):
            best = Fit(p.clone(), q.clone(), torch.cat([best.objective, best.objective.new_tensor([value])]))
    return best


def _combine(factors: Sequence[Factors], weights: Tensor, fit: Fit) -> Factors:
    """`B̂, Â` in the gauge of the means: the split `(cB̂, Â/c)` with `‖B̂‖/‖Â‖ = ‖B̄‖/‖Ā‖`."""
    hat = Factors(mean([pair.B for pair in factors], fit.p), mean([pair.A for pair in factors], fit.q))
    bar = mean_factors(factors, weights)
    ratio = (bar.B.norm() * hat.A.norm()) / (bar.A.norm() * hat.B.norm())
    gauge = ratio.sqrt() if torch.isfinite(ratio) and ratio > 0 else torch.ones(())
    return Factors(hat.B * gauge, hat.A / gauge)
