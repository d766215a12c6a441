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
from fedlora.strategies.mixing import Problem, Stacked, problem_of
from fedlora.strategies.simplex import project_to_simplex


class FLoRANA(Strategy):
    """`B̂ = Σ p_u B_u`, `Â = Σ q_u A_u` with p, q that bring `B̂Â` nearest to `Σ w_u B_uA_u`. arXiv 2509.26399.

    Solved per module by alternating least squares (our reading of the paper's minimisation): on r × r blocks, or for
    many clients by LSQR on the uploads themselves. It starts at p = q = w and never rises, so ρ is at most FedIT's by
    construction, under every option.
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
        groups = [list(updates.modules)] if self.options.shared else [[module] for module in updates.modules]
        factors, diagnostics = {}, {}
        for group in groups:
            uploaded = {m: Stacked.of(updates.factors(m, state.rank(m))) for m in group}
            fit = solve([_in_common_units(state, m, uploaded[m]) for m in group], updates.weights, self.options)
            for module in group:
                factors[module] = _combine(uploaded[module], updates.weights, fit)
                diagnostics[module] = {"p": fit.p, "q": fit.q, "objective": fit.objective}
        return state.with_factors(factors, diagnostics)


def _in_common_units(state: ServerState, module: str, uploaded: Stacked) -> Stacked:
    """Factors whose products compare with those of other modules: a module's weight in a common objective is s²."""
    ratio = state.scaling_of(module) / state.scaling
    return uploaded if ratio == 1 else Stacked(ratio * uploaded.B.double(), uploaded.A)


@dataclass(frozen=True)
class Fit:
    """Mixing weights `p`, `q` (U) and the objective at the start and after each step that was taken: the sum over
    modules of `‖B̂Â − Σ w BA‖²`, with the ridge's terms."""

    p: Tensor
    q: Tensor
    objective: Tensor


def solve(modules: Sequence[Sequence[Factors]], weights: Tensor, options: FLoRANA.Options | None = None) -> Fit:
    """Mixing weights for the uploads of one module, or of several that share them.

    Args:
        modules: per module the clients' factors, of one rank.
        weights: (U), the weights of the mean product that is approached.
        options: solver, limits, ridge and constraint.

    What does not lower the objective is not taken, so it never rises from p = q = w.
    """
    chosen = options or FLoRANA.Options()
    problem = problem_of(modules, weights, chosen.ridge)
    return _by_gradient(problem, chosen) if chosen.solver == "adam" else _by_turns(problem, chosen)


def _by_turns(problem: Problem, options: FLoRANA.Options) -> Fit:
    """Alternating least squares: one sweep fits p, then q."""
    p = q = problem.w
    objective = [problem.value(p, q)]
    for _ in range(options.max_sweeps):
        p_new = problem.best_p(q, p, options.simplex)
        q_new = problem.best_q(p_new, q, options.simplex)
        value = problem.value(p_new, q_new)
        if value >= objective[-1]:
            break
        p, q = p_new, q_new
        objective.append(value)
        if objective[-2] - value <= options.tolerance * objective[-2]:
            break
    return Fit(p, q, problem.w.new_tensor(objective))


def _by_gradient(problem: Problem, options: FLoRANA.Options) -> Fit:
    """Adam on p and q together, in steps of a hundredth of an even weight; the best point that it passes is kept."""
    p, q = problem.w.clone(), problem.w.clone()
    optimizer = torch.optim.Adam([p, q], lr=0.01 / len(p))
    best = Fit(p.clone(), q.clone(), p.new_tensor([problem.value(p, q)]))
    for _ in range(options.max_sweeps):
        p.grad, q.grad = problem.slopes(p, q)
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
    gauge = ratio.sqrt() if torch.isfinite(ratio) and ratio > 0 else torch.ones_like(ratio)
    return Factors(hat.B * gauge, hat.A / gauge)
