"""Algebra of weighted sums of products `Σ c_k B_k A_k` without forming d_out × d_in matrices where that is dearer.

Everything exact rests on this: float64 throughout, and differences are taken in coordinates, never as differences
of squares (ALGORITHMS §3: those gave 7e-4 for a true 3e-5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapter import Factors

_NULL = 1e-12
"""A singular value below this share of the largest is a direction in which nothing was learned."""


def _reduced(blocks: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """Blocks (d × r_k) in an orthonormal basis of their joint span, with the basis; as they are (basis None) when the
    joint width is not below d, where a basis would save nothing."""
    stacked = torch.cat([block.to(torch.float64) for block in blocks], dim=1)
    widths = [block.shape[1] for block in blocks]
    if stacked.shape[1] >= stacked.shape[0]:
        return None, list(torch.split(stacked, widths, dim=1))
    basis, coordinates = torch.linalg.qr(stacked)
    return basis, list(torch.split(coordinates, widths, dim=1))


class Frame:
    """Common orthonormal coordinates for many factors: products in it have the same norms, inner products and singular
    values as the d_out × d_in matrices they stand for, at the size of the joint rank.

    Args:
        factors: the pairs (B_k, A_k), d_out and d_in equal for all, ranks free.
    """

    def __init__(self, factors: Sequence[Factors]) -> None:
        self.left_basis, self._left = _reduced([pair.B for pair in factors])
        self.right_basis, self._right = _reduced([pair.A.T for pair in factors])

    def product(self, index: int) -> Tensor:
        """`B_k A_k` of one pair, in the frame's coordinates."""
        return self._left[index] @ self._right[index].T

    def combine(self, coefficients: Tensor | Sequence[float]) -> Tensor:
        """`Σ c_k B_k A_k` over the first `len(coefficients)` pairs, in the frame's coordinates."""
        count = len(coefficients)
        scaled = [float(c) * block for c, block in zip(coefficients, self._left, strict=False)]
        return torch.cat(scaled, dim=1) @ torch.cat(self._right[:count], dim=1).T

    def lift(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Columns in the frame's coordinates as columns in the original ones, left (d_out × k) and right (d_in × k)."""
        outer = left if self.left_basis is None else self.left_basis @ left
        inner = right if self.right_basis is None else self.right_basis @ right
        return outer, inner


@dataclass(frozen=True)
class TruncatedSVD:
    """The best rank-r approximation `U diag(S) Vᵀ` of a sum of products, and the singular values it leaves out.

    Shapes: `U` (d_out × r), `S` (r), `Vh` (r × d_in), `tail` (the other singular values, descending).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    tail: Tensor

    def balanced(self) -> Factors:
        """`B = U√S`, `A = √S Vᵀ`: the split with equal norms on both sides.

        In directions in which nothing was learned (S = 0) B is zero and A keeps the unit row of `Vᵀ`, so that the
        product is unchanged and the direction can still be trained: with both zero its gradient would vanish for ever.
        """
        learned = (
            _NULL * self.S.max() < self.S
            if self.S.numel() and self.S.max() > 0
            else torch.zeros_like(self.S, dtype=torch.bool)
        )
        root = self.S.clamp_min(0).sqrt()
        scale_a = torch.where(learned, root, torch.ones_like(root))
        scale_b = torch.where(learned, root, torch.zeros_like(root))
        return Factors(self.U * scale_b, scale_a[:, None] * self.Vh)


def truncated_svd(factors: Sequence[Factors], coefficients: Tensor | Sequence[float], rank: int) -> TruncatedSVD:
    """The best approximation of `Σ c_k B_k A_k` of rank `rank`, or of the joint rank where that is less (Eckart–Young).

    By QR of the stacked factors and the SVD of the small core; by one dense accumulator where the joint rank reaches
    min(d_out, d_in).
    """
    frame = Frame(factors)
    left, values, right = torch.linalg.svd(frame.combine(coefficients), full_matrices=False)
    outer, inner = frame.lift(left[:, :rank], right[:rank].T)
    return TruncatedSVD(outer, values[:rank], inner.T, values[rank:])


def mean(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """`Σ w_k T_k` for tensors of one shape, accumulated in float64 in the order given."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for weight, tensor in zip(weights.tolist(), tensors, strict=True):
        total.add_(tensor.to(torch.float64), alpha=weight)
    return total


def mean_factors(factors: Sequence[Factors], weights: Tensor) -> Factors:
    """`B̄ = Σ w_u B_u` and `Ā = Σ w_u A_u` (equal ranks), in float64."""
    return Factors(mean([pair.B for pair in factors], weights), mean([pair.A for pair in factors], weights))
