"""The least-squares problem of one weight per client and factor: `‖(Σ p_u B_u)(Σ q_u A_u) − Σ w_u B_uA_u‖²`.

Two routes to the same minima, chosen by cost in `problem_of`: blocks `B_uᵀB_v`, `A_uA_vᵀ` for few clients, and for many
products with the uploads themselves, which take no more numbers than the uploads have.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from fedlora.adapter import Factors
from fedlora.adapter.factors import ProductSum
from fedlora.strategies.leastsquares import Columns, Half, Rows
from fedlora.strategies.simplex import minimise_on_simplex

_LARGE = 1024
"""Joint rank from which products with the uploads are considered: below, blocks are a matter of milliseconds."""
_PASSES = 120
"""Products with all uploads in a fit: three or four sweeps of some ten iterations a factor."""
_PER_PASS = 8
"""Time of a multiplication in such a product, which memory bounds, in those of a product of matrices."""


class Stacked(Sequence[Factors]):
    """Pairs of one shape and rank, held once: B (U × d_out × r) and A (U × r × d_in), in the uploads' own type."""

    def __init__(self, B: Tensor, A: Tensor) -> None:
        self.B, self.A = B, A

    @classmethod
    def of(cls, factors: Sequence[Factors]) -> Stacked:
        """These pairs, each read once."""
        if isinstance(factors, Stacked):
            return factors
        pair = factors[0]
        B, A = (t.new_empty((len(factors), *t.shape)) for t in (pair.B, pair.A))
        for u, pair in enumerate(factors):
            if B.dtype != (wider := torch.promote_types(B.dtype, pair.B.dtype)):
                B = B.to(wider)
            if A.dtype != (wider := torch.promote_types(A.dtype, pair.A.dtype)):
                A = A.to(wider)
            B[u], A[u] = pair.B, pair.A
        return cls(B, A)

    def __len__(self) -> int:
        return len(self.B)

    @overload
    def __getitem__(self, index: int) -> Factors: ...
    @overload
    def __getitem__(self, index: slice) -> Stacked: ...
    def __getitem__(self, index: int | slice) -> Factors | Stacked:
        made = Stacked if isinstance(index, slice) else Factors
        return made(self.B[index], self.A[index])

    @property
    def joint_rank(self) -> int:
        return len(self.A) * self.A.shape[1]


class Problem(ABC):
    """The objective of p and q over one or several modules: `Σ ‖B̂Â − Σ w BA‖² + λ_p‖p − w‖² + λ_q‖q − w‖²`."""

    w: Tensor
    _ridge_p: float
    _ridge_q: float

    @abstractmethod
    def best_p(self, q: Tensor, start: Tensor, simplex: bool) -> Tensor:
        """The best p at this q, of minimum norm where there are several; on the simplex by steps from `start`."""

    @abstractmethod
    def best_q(self, p: Tensor, start: Tensor, simplex: bool) -> Tensor:
        """The best q at this p, likewise."""

    @abstractmethod
    def slopes(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the objective in p and in q."""

    @abstractmethod
    def _fit(self, p: Tensor, q: Tensor) -> float:
        """The objective without the ridge's terms."""

    def value(self, p: Tensor, q: Tensor) -> float:
        pull = self._ridge_p * (p - self.w).square().sum() + self._ridge_q * (q - self.w).square().sum()
        return self._fit(p, q) + float(pull)


def problem_of(modules: Sequence[Sequence[Factors]], weights: Tensor, ridge: float) -> Problem:
    """The problem of some modules' uploads, on the cheaper route."""
    stacks = [Stacked.of(factors) for factors in modules]
    own = weights.to(stacks[0].B.device)
    return StreamedProblem(stacks, own, ridge) if _streams(stacks) else GramProblem(stacks, own, ridge)


def _streams(stacks: Sequence[Stacked]) -> bool:
    """Whether products with the uploads are cheaper than their blocks, in multiplications."""
    blocks = products = 0
    for stack in stacks:
        d_out, d_in = stack[0].shape
        joint = stack.joint_rank
        blocks += (d_out + d_in) * joint**2
        products += d_out * d_in * joint + _PASSES * _PER_PASS * (d_out + d_in) * joint
    return max(stack.joint_rank for stack in stacks) >= _LARGE and products < blocks


# -- few clients: blocks --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grams:
    """`B[u,v] = B_uᵀB_v` and `A[u,v] = A_uA_vᵀ`, each (U × U × r × r): all that a module's objective depends on."""

    B: Tensor
    A: Tensor
    weights: Tensor

    @classmethod
    def of(cls, factors: Stacked, weights: Tensor) -> Grams:
        b, a = factors.B.double(), factors.A.double()
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


class GramProblem(Problem):
    """By normal equations of blocks: U²r² numbers a factor and module, and systems of U × U."""

    def __init__(self, modules: Sequence[Stacked], weights: Tensor, ridge: float) -> None:
        self.w = weights.double()
        self._for_p = [Grams.of(factors, self.w) for factors in modules]
        self._for_q = [grams.swapped() for grams in self._for_p]
        self._target = sum(grams.target() for grams in self._for_p)
        self._ridge_p, self._ridge_q = (
            ridge * float(_sum_systems(grams, self.w)[0].diagonal().mean()) for grams in (self._for_p, self._for_q)
        )

    def best_p(self, q: Tensor, start: Tensor, simplex: bool) -> Tensor:
        return _best(*self._system_p(q), start, simplex)

    def best_q(self, p: Tensor, start: Tensor, simplex: bool) -> Tensor:
        return _best(*self._system_q(p), start, simplex)

    def slopes(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        by_p, by_q = (2 * (left @ x - right) for x, (left, right) in ((p, self._system_p(q)), (q, self._system_q(p))))
        return by_p, by_q

    def _system_p(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """`H p = h` whose least-squares solution is the best p at this q."""
        return self._pulled(_sum_systems(self._for_p, q), self._ridge_p)

    def _system_q(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """`H q = h` whose least-squares solution is the best q at this p."""
        return self._pulled(_sum_systems(self._for_q, p), self._ridge_q)

    def _pulled(self, system: tuple[Tensor, Tensor], ridge: float) -> tuple[Tensor, Tensor]:
        left, right = system
        return left + ridge * torch.eye(len(right), dtype=left.dtype, device=left.device), right + ridge * self.w

    def _fit(self, p: Tensor, q: Tensor) -> float:
        left, right = _sum_systems(self._for_p, q)
        return max(float(p @ left @ p - 2 * p @ right) + self._target, 0.0)


def _sum_systems(modules: Sequence[Grams], fixed: Tensor) -> tuple[Tensor, Tensor]:
    systems = [grams.system(fixed) for grams in modules]
    return torch.stack([left for left, _ in systems]).sum(0), torch.stack([right for _, right in systems]).sum(0)


def _best(left: Tensor, right: Tensor, start: Tensor, simplex: bool) -> Tensor:
    """The minimiser of `xᵀHx − 2xᵀh`, on the simplex or free (then of minimum norm: clients may coincide)."""
    if simplex:
        return minimise_on_simplex(left, right, start)
    system = (left.cpu(), right[:, None].cpu())  # least norm is for processors alone
    solution: Tensor = torch.linalg.lstsq(*system, rcond=1e-12, driver="gelsd").solution
    return solution[:, 0].to(right.device)


# -- many clients: products with the uploads ------------------------------------------------------------------------


class StreamedProblem(Problem):
    """By LSQR on products with the uploads, warm from one sweep to the next: of numbers it holds the uploads', and W*
    of each module as a dense matrix, from which the objective is taken directly and not as a difference of squares."""

    def __init__(self, modules: Sequence[Stacked], weights: Tensor, ridge: float) -> None:
        self.w = weights.double()
        self._B, self._A = [Rows(stack.B) for stack in modules], [Rows(stack.A) for stack in modules]
        self._ideal = [ProductSum.of(stack, self.w).matrix() for stack in modules]
        self._ridge_p = self._ridge_q = 0.0
        self._fitted: set[str] = set()
        if ridge:
            self._ridge_p, self._ridge_q = (
                ridge * math.fsum(each.mean_square() for each in half.columns)
                for half in (self._half_p(self.w), self._half_q(self.w))
            )

    def best_p(self, q: Tensor, start: Tensor, simplex: bool) -> Tensor:
        return self._best("p", self._half_p(q), start, simplex)

    def best_q(self, p: Tensor, start: Tensor, simplex: bool) -> Tensor:
        return self._best("q", self._half_q(p), start, simplex)

    def slopes(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        by_p, by_q = (2 * (half @ x - half.right()) for x, half in ((p, self._half_p(q)), (q, self._half_q(p))))
        return by_p, by_q

    def _best(self, name: str, half: Half, start: Tensor, simplex: bool) -> Tensor:
        if simplex:
            return minimise_on_simplex(half, half.right(), start, half.largest())
        warm = start if name in self._fitted else None  # the clients' weights are not of least norm
        self._fitted.add(name)
        return half.minimise(warm)

    def _half_p(self, q: Tensor) -> Half:
        columns, wanted = [], []
        for B, A, ideal in zip(self._B, self._A, self._ideal, strict=True):
            basis, triangle = torch.linalg.qr(A.sum(q).T)
            columns.append(Columns(B, triangle, before=False))
            wanted.append(ideal @ basis)
        return Half(columns, wanted, self.w, self._ridge_p)

    def _half_q(self, p: Tensor) -> Half:
        columns, wanted = [], []
        for B, A, ideal in zip(self._B, self._A, self._ideal, strict=True):
            basis, triangle = torch.linalg.qr(B.sum(p))
            columns.append(Columns(A, triangle, before=True))
            wanted.append(basis.T @ ideal)
        return Half(columns, wanted, self.w, self._ridge_q)

    def _fit(self, p: Tensor, q: Tensor) -> float:
        parts = zip(self._B, self._A, self._ideal, strict=True)
        return math.fsum(
            float(torch.addmm(ideal, B.sum(p), A.sum(q), beta=-1).square_().sum()) for B, A, ideal in parts
        )
