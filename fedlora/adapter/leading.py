"""The leading directions of a large sum of products and the norm of the rest, by block Krylov iteration in float64.

W is only applied, as a stack of factors or as a dense matrix. With orthonormal columns Q (d_out × m) and `M = QᵀW`, all
that is asked of W is asked of M, at its small size, and of `‖W − QM‖²`, which is taken of what is left over and not as
a difference of squares. Residual norms say whether the directions are the leading ones; where they or the digits of the
rest do not suffice, the answer is None, and the exact way is the caller's.

After Musco and Musco (arXiv 1504.05477), with all blocks kept orthogonal; the certificate is the second-order error of
Ritz values.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapter.weights import Factors

LARGE = 384
"""The smaller side, or joint rank, below which a full decomposition is a matter of milliseconds, and is taken."""
_MORE = 8
"""Columns of a block beyond the directions that are wanted."""
_LARGEST_SHARE = 3
"""Columns in all are at most this fraction of the side: beyond, a full decomposition costs no more."""
_BLOCKS = 8
"""Blocks within which a further attempt is likely to settle; each that does not costs a third of a decomposition."""
_PROBES = 16
"""Random columns of which a norm is taken where tens of percent suffice."""
_DIGITS = 1e-10
"""Share of the tail by which directions may fall short of the leading ones."""
_NOTHING = 1e-12
"""Share of the largest singular value below which a direction holds nothing but rounding."""
_ROUNDING = 1e-15
"""Share of the terms of a sum by which it may be off."""
_TRUSTED = 1e-9
"""Share of a distance that rounding may be."""
_WIDTH = 128
"""Columns of a stack that are multiplied with others at a time."""


class Operator:
    """W (d_out × d_in) as `left @ rightᵀ` of stacked factors, or as a dense matrix."""

    def __init__(self, dense: Tensor | None, left: Sequence[Tensor] = (), right: Sequence[Tensor] = ()) -> None:
        self.dense = dense
        if dense is None:
            self.left, self.right = torch.cat(list(left), dim=1), torch.cat(list(right), dim=1)

    @property
    def shape(self) -> tuple[int, int]:
        if self.dense is not None:
            return self.dense.shape[0], self.dense.shape[1]
        return self.left.shape[0], self.right.shape[0]

    @property
    def size(self) -> int:
        """A bound of the rank: the joint rank of a stack, the smaller side of a matrix."""
        return min(self.shape) if self.dense is not None else self.left.shape[1]

    @property
    def device(self) -> torch.device:
        return self.left.device if self.dense is None else self.dense.device

    def times(self, columns: Tensor) -> Tensor:
        """`W @ columns`."""
        return self.dense @ columns if self.dense is not None else self.left @ _transposed(self.right, columns)

    def back(self, columns: Tensor) -> Tensor:
        """`Wᵀ @ columns`."""
        if self.dense is not None:
            return _transposed(self.dense, columns)
        return self.right @ _transposed(self.left, columns)


def _transposed(matrix: Tensor, columns: Tensor) -> Tensor:
    """`matrixᵀ @ columns`, read along the rows: of few columns that takes half the time."""
    found: Tensor = (columns.T @ matrix).T
    return found


@dataclass(frozen=True)
class Subspace:
    """Orthonormal columns `basis` (d_out × m), and `inside = basisᵀW` (m × d_in) as `left @ diag(S) @ Vh`."""

    basis: Tensor
    left: Tensor
    S: Tensor
    Vh: Tensor

    @classmethod
    def of(cls, basis: Tensor, inside: Tensor) -> Subspace:
        right, triangle = torch.linalg.qr(inside.T)
        left, S, Vh = torch.linalg.svd(triangle.T, full_matrices=False)
        return cls(basis, left, S, Vh @ right.T)

    @property
    def inside(self) -> Tensor:
        """`basisᵀW` (m × d_in)."""
        return (self.left * self.S) @ self.Vh

    def beside(self, operator: Operator) -> tuple[float, float]:
        """`‖W − QQᵀW‖²`, and by how much rounding may have moved it where it is a sum of terms of either sign.

        Of a stack, both sides are freed of the directions that are known before their inner products are taken.
        """
        if operator.dense is not None:
            return square(torch.addmm(operator.dense, self.basis, self.inside, alpha=-1)), 0.0
        along = self.Vh @ operator.right
        left = torch.addmm(operator.left, self.basis, self.basis.T @ operator.left, alpha=-1)
        right = torch.addmm(operator.right, self.Vh.T, along, alpha=-1)
        rest2 = terms = 0.0
        for begin in range(0, left.shape[1], _WIDTH):
            end = begin + _WIDTH
            each = (left[:, begin:end].T @ left[:, :end]).mul_(right[:, begin:end].T @ right[:, :end])
            each[:, :begin] *= 2
            rest2, terms = rest2 + float(each.sum()), terms + float(each.abs_().sum())
        return square(left @ along.T) + max(rest2, 0.0), _ROUNDING * terms

    def rest_about(self, operator: Operator) -> float:
        """`‖W − QQᵀW‖²` to within tens of percent, of random columns."""
        columns = _random(operator, _PROBES, seed=1)
        images = operator.times(columns)
        return square(images - self.basis @ (self.basis.T @ images)) / _PROBES

    def count(self, share: float, rank: int, all2: float) -> float:
        """How many leading directions make up a share of all squares, of which `rank` are known: exact where these do,
        not too few where those of the basis do (its values are never above W's), and else about so many."""
        squares = self.S.square()
        reached = squares.cumsum(0)
        found = int((reached < share * all2).sum()) + 1
        if found <= len(squares):
            return found
        missing, beyond = share * all2 - float(reached[rank - 1]), float(squares[rank])
        return rank + missing / beyond if beyond else math.inf

    def falls_short(self, operator: Operator, rank: int) -> float:
        """By how much the squares of the first `rank` singular values fall short of W's, in second order: of residuals
        `‖Wv − σu‖` and the distance to what lies beyond the block."""
        S, beyond = self.S, float(self.S[min(rank + _MORE, len(self.S) - 1)])
        residual = operator.times(self.Vh[:rank].T) - self.basis @ (self.left[:, :rank] * S[:rank])
        residual2, kept2 = residual.square().sum(0), S[:rank].square()
        gap2 = kept2 - beyond**2
        share = torch.where(gap2 > 0, kept2 / gap2, torch.full_like(gap2, math.inf))
        share = torch.where(S[:rank] <= _NOTHING * S[0], torch.ones_like(share), share)
        return float((residual2 * share).nan_to_num(0.0, posinf=math.inf).sum())


def subspace(operator: Operator, rank: int) -> Subspace | None:
    """Columns that hold the `rank` leading left directions of W, or None where W is small or they do not settle.

    The first block is random with a fixed seed, so that the same W gives the same bits.
    """
    most = operator.size // _LARGEST_SHARE
    width = rank + _MORE
    if operator.size < LARGE or 3 * width > most or not rank:
        return None
    block = operator.times(_random(operator, width, seed=0))
    blocks: list[Tensor] = []
    inside: list[Tensor] = []
    check = 3
    while (len(blocks) + 1) * width <= most:
        blocks.append(_beside(block, blocks))
        inside.append(operator.back(blocks[-1]))
        if len(blocks) == check:
            found = Subspace.of(torch.cat(blocks, dim=1), torch.cat(inside, dim=1).T)
            if not found.S[0] > 0:
                return None  # nothing to find: the columns of further blocks would be those of the first
            tail2, all2 = square(found.S[rank:]), square(found.S)
            if found.falls_short(operator, rank) <= max(_DIGITS * tail2, _NOTHING**2 * all2):
                return found
            check += max(1, check // 3)
        block = operator.times(inside[-1])
    return None


def _random(operator: Operator, count: int, seed: int) -> Tensor:
    """Columns to which W can be applied (d_in × count): the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(operator.shape[1], count, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(operator.device)


def holding(operator: Operator, share: float, rank: int) -> tuple[Subspace, int] | None:
    """Columns that hold the fewest leading left directions with `share` of the squares of all, and how many these are;
    None where W is small, they do not settle, or they are too many for that. First `rank` are tried.

    Of more directions than are tried there must be room for some blocks, or they are given up at once: so many seldom
    settle. That is looked at with the norm of the rest to within tens of percent before it is taken to all digits.
    """
    most = operator.size // (_LARGEST_SHARE * _BLOCKS) - _MORE
    all2 = None
    while share < 1:
        found = subspace(operator, rank)
        if found is None:
            return None
        if all2 is None:
            held2 = square(found.S)
            if found.count(share, rank, held2 + found.rest_about(operator) / 2) > max(rank, most):
                return None
            rest2, rounding = found.beside(operator)
            all2 = held2 + rest2
            if rounding > _TRUSTED * (1 - share) * all2:
                return None
        count = found.count(share, rank, all2)
        if count <= rank:
            return found, int(count)
        if count > most:
            return None
        rank = math.ceil(count)
    return None


def directions_for(values: Tensor, share: float) -> int:
    """The fewest leading singular values whose squares make up `share` of all squares (0 where all are zero).

    A share of 1 takes every value above the rounding of the largest.
    """
    energy = values.double().square()
    if not len(values) or float(energy.sum()) == 0:
        return 0
    if share >= 1:
        return int((values > 1e-12 * values.max()).sum())
    reached = energy.cumsum(0) >= share * energy.sum()
    return int(torch.nonzero(reached)[0]) + 1


def _beside(block: Tensor, others: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis of the part of a block that is orthogonal to the others: twice is enough."""
    for _ in range(2):
        for other in others:
            block = block - other @ (other.T @ block)
        block = torch.linalg.qr(block).Q
    return block


@dataclass(frozen=True)
class Distances:
    """Of W to some products: `ideal2 = ‖W‖²`, `errors2[k] = ‖Ŵ_k − W‖²`, `tails2[r]`: what rank r leaves out of W."""

    ideal2: float
    errors2: Sequence[float]
    tails2: dict[int, float]


def distances(operator: Operator, others: Sequence[Factors], ranks: Collection[int]) -> Distances | None:
    """All distances by the leading directions, or None where W is small, they do not settle, or stacked factors cancel
    each other so far that a distance's digits are rounding.

    Args:
        operator: W.
        others: pairs (B̂_k, Â_k) in float64; where W is a stack, together of a rank that is small beside its own.
        ranks: those of the tails.
    """
    found = subspace(operator, max(ranks))
    if found is None:
        return None
    if operator.dense is not None:
        return _of_matrix(operator, operator.dense, found, others, ranks)
    if sum(pair.rank for pair in others) > operator.size // _LARGEST_SHARE:
        return None
    for pair in others:  # with their columns in the basis, what is beside it is of W alone
        found = Subspace.of(*_joined(operator, found, pair.B))
    inside = found.inside
    rest2, rounding = found.beside(operator)
    squares = found.S.square()
    tails2 = {rank: float(squares[rank:].sum()) + rest2 for rank in ranks}
    errors2 = [square((found.basis.T @ pair.B) @ pair.A - inside) + rest2 for pair in others]
    trusted = rounding <= _TRUSTED * min(*errors2, *tails2.values(), math.inf)
    return Distances(float(squares.sum()) + rest2, errors2, tails2) if trusted else None


def _joined(operator: Operator, found: Subspace, columns: Tensor) -> tuple[Tensor, Tensor]:
    """A basis with further columns in it, and W in it."""
    more = _beside(columns, [found.basis])
    return torch.cat([found.basis, more], dim=1), torch.cat([found.inside, operator.back(more).T])


def _of_matrix(
    operator: Operator, dense: Tensor, found: Subspace, others: Sequence[Factors], ranks: Collection[int]
) -> Distances:
    """As `distances`, of a matrix: differences are taken number by number."""
    rest2, _ = found.beside(operator)
    squares = found.S.square()
    tails2 = {rank: float(squares[rank:].sum()) + rest2 for rank in ranks}
    errors2 = [square(torch.addmm(dense, pair.B, pair.A, beta=-1)) for pair in others]
    return Distances(square(dense), errors2, tails2)


def square(matrix: Tensor) -> float:
    """`‖M‖²` in the Frobenius sense."""
    return float(matrix.square().sum())
