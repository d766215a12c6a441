"""Algebra of weighted sums of products `Σ c_k B_k A_k` without forming d_out × d_in matrices where that is dearer.

Everything exact rests on this: float64 throughout, and differences are taken in coordinates, never as differences
of squares: those gave 7e-4 for a true 3e-5 in float32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapter import leading
from fedlora.adapter.leading import Distances, Operator, Subspace, directions_for, square, subspace
from fedlora.adapter.weights import Factors, Kind

_NULL = 1e-12
"""A singular value below this share of the largest is a direction in which nothing was learned."""
_WORTH_A_PRODUCT = 256
"""Joint rank at which stacked factors are added to a dense matrix: the matrix is read and written once for all."""
_SOLVABLE = 1e-4
"""A triangle whose diagonal varies less than this is inverted; otherwise the orthonormal basis itself is formed."""


class ProductSum:
    """`Σ c_k B_k A_k` (d_out × d_in), added one pair at a time in float64.

    Kept as stacked factors while their joint rank is below min(d_out, d_in); beyond, as one dense matrix, to which the
    stack is added whenever it is wide enough to be worth a product. So memory is bounded by the dense matrix however
    many pairs are added, and the result does not depend on the route (1e-12).
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []
        self._dense: Tensor | None = None

    @classmethod
    def of(cls, factors: Iterable[Factors], coefficients: Tensor | Sequence[float]) -> ProductSum:
        """The sum over pairs of one shape; ranks are free.

        Raises:
            ValueError: no pair.
        """
        total: ProductSum | None = None
        for coefficient, pair in zip(coefficients, factors, strict=True):
            total = (total or cls(pair.shape)).add(float(coefficient), pair)
        if total is None:
            raise ValueError("a sum of products needs at least one pair")
        return total

    @property
    def width(self) -> int:
        """The joint rank of what is stacked."""
        return sum(block.shape[1] for block in self.left)

    @property
    def dense(self) -> Tensor | None:
        """The matrix itself, once the joint rank has reached min(d_out, d_in)."""
        if self._dense is not None and self.left:
            self._flush(self._dense)
        return self._dense

    def add(self, coefficient: float, pair: Factors) -> ProductSum:
        """Add `coefficient·B@A` in place; returns itself."""
        if coefficient == 1 and not self.left and (whole := _whole(pair)) is not None:
            if self._dense is None:
                self._dense = whole.new_zeros(self.shape, dtype=torch.float64)
            self._dense += whole
            return self
        self.left.append(coefficient * pair.B.to(torch.float64))
        self.right.append(pair.A.T.to(torch.float64))
        if self._dense is None and self.width >= min(self.shape):
            self._dense = pair.B.new_zeros(self.shape, dtype=torch.float64)
        if self._dense is not None and self.width >= _WORTH_A_PRODUCT:
            self._flush(self._dense)
        return self

    def _flush(self, dense: Tensor) -> None:
        dense.addmm_(torch.cat(self.left, dim=1), torch.cat(self.right, dim=1).T)
        self.left, self.right = [], []

    def factors(self) -> Factors:
        """The sum as one exact pair: the stack, or the dense matrix beside an identity on its smaller side."""
        if self.dense is None:
            return Factors(torch.cat(self.left, dim=1), torch.cat(self.right, dim=1).T)
        return beside_identity(self.dense)

    def matrix(self) -> Tensor:
        """The sum itself (d_out × d_in, float64); where it is dense already, not a copy."""
        return self.dense if self.dense is not None else self.factors().product()

    def times(self, matrix: Tensor) -> Tensor:
        """`(Σ c_k B_k A_k) @ matrix` (d_out × n) for a `matrix` (d_in × n)."""
        wanted = matrix.to(torch.float64)
        if self.dense is not None:
            return self.dense @ wanted
        return torch.cat(self.left, dim=1) @ (torch.cat(self.right, dim=1).T @ wanted)

    @property
    def is_large(self) -> bool:
        """Whether a full decomposition takes more than milliseconds."""
        return min(self.shape) >= leading.LARGE and (self.dense is not None or self.width >= leading.LARGE)

    def operator(self) -> Operator:
        """The sum as something that is applied."""
        return Operator(self.dense, self.left, self.right)

    def leading(self, rank: int) -> Triples:
        """The best approximation of rank `rank` (or of the joint rank where that is less), without the values that it
        leaves out: by block Krylov iteration where the sum is large, to ten digits of the tail, otherwise and where
        that does not certify itself as `truncated`."""
        found = subspace(self.operator(), rank) if self.is_large else None
        return self.truncated(rank) if found is None else Triples.within(found, rank)

    def holding(self, share: float, about: int, least: int = 0) -> Triples:
        """The fewest leading directions whose squares make up `share` of those of all, but no fewer than `least`; as in
        `leading`, where they are few: first `about` that many are tried. With a share of 1, or where they are many, all
        are decomposed."""
        found = leading.holding(self.operator(), share, max(about, least)) if self.is_large else None
        if found is not None:
            return Triples.within(found[0], max(found[1], least))
        exact = self.truncated(min(self.shape))
        return exact.first(max(directions_for(exact.S, share), least))

    def divided(self, rank: int, kept: int, scale: float = 1.0) -> tuple[Triples, Factors]:
        """The leading `rank` directions, and `scale` times what the first `kept` (≤ rank) of them leave, to rounding,
        whatever they are: as a pair of the joint rank less `kept`, or as a dense matrix beside an identity."""
        found = subspace(self.operator(), rank) if self.is_large else None
        if found is not None:
            divided = self._divided(found, rank, kept, scale)
            if divided is not None:
                return divided
        exact = self.truncated(min(self.shape))
        rest = Factors(exact.U[:, kept:] * (scale * exact.S[kept:]), exact.Vh[kept:])
        return exact.first(rank), rest

    def _divided(self, found: Subspace, rank: int, kept: int, scale: float) -> tuple[Triples, Factors] | None:
        """As `divided`, or None where the sum has hardly as many directions as are kept.

        Of `W = LRᵀ` in R stacked columns: with `uᵀW = S vᵀ`, the projection `W(I − vvᵀ)` takes nothing from the row
        space of `uᵀL`, so that it is a product in the R − kept coordinates beside that. What is kept is `Wvvᵀ`.
        """
        best = Triples.within(found, rank)
        if self.dense is not None:
            first = best.first(kept)
            return best, beside_identity(torch.addmm(self.dense, first.U * first.S, first.Vh, beta=scale, alpha=-scale))
        left, right = torch.cat(self.left, dim=1), torch.cat(self.right, dim=1)
        rows = best.Vh[:kept]
        along = rows @ right
        turned, scales = torch.geqrf((best.U[:, :kept].T @ left).T)
        outer = torch.ormqr(turned, scales, left, left=False)
        inner = torch.ormqr(turned, scales, right - rows.T @ along, left=False)
        if product_norm(Factors(outer[:, :kept], inner[:, :kept].T)) > _NULL * float(best.S[0]):
            return None
        return best.with_first(left @ along.T, rows), Factors(scale * outer[:, kept:], inner[:, kept:].T)

    def truncated(self, rank: int) -> TruncatedSVD:
        """The best approximation of rank `rank`, or of the joint rank where that is less (Eckart–Young): by QR of the
        stack and the SVD of the small core, or by the SVD of the dense matrix."""
        frame = Frame(self)
        left, values, right = torch.linalg.svd(frame.total, full_matrices=False)
        outer, inner = frame.lift(left[:, :rank], right[:rank].T)
        return TruncatedSVD(outer, values[:rank], inner.T, values[rank:])


def beside_identity(dense: Tensor) -> Factors:
    """A matrix (d_out × d_in) as a pair: itself, and an identity on its smaller side."""
    eye = torch.eye(min(dense.shape), dtype=dense.dtype, device=dense.device)
    return Factors(eye, dense) if dense.shape[0] <= dense.shape[1] else Factors(dense, eye)


def _whole(pair: Factors) -> Tensor | None:
    """The matrix that stands beside an identity, where one does: what `beside_identity` was given."""
    if pair.rank < min(pair.shape):
        return None
    if is_identity(pair.B):
        return pair.A
    return pair.B if is_identity(pair.A) else None


def is_identity(side: Tensor) -> bool:
    """Whether a matrix is one that changes nothing."""
    if side.shape[0] != side.shape[1] or not (side.diagonal() == 1).all():
        return False
    return torch.equal(side, torch.eye(len(side), dtype=side.dtype, device=side.device))


class Frame:
    """Common orthonormal coordinates for a sum of products and further pairs: in them, matrices have the same norms,
    inner products and singular values as the d_out × d_in matrices they stand for, at the size of the joint rank.

    Args:
        total: the sum; `Frame.total` is its matrix in these coordinates.
        others: pairs (B, A) of the same d_out and d_in; `Frame.other(k)` is the product of the k-th.
    """

    def __init__(self, total: ProductSum, others: Sequence[Factors] = ()) -> None:
        width = total.width + sum(pair.rank for pair in others)
        self._others = [pair.to(torch.float64) for pair in others]
        self._sides: tuple[_Side, _Side] | None = None
        if total.dense is not None or width >= min(total.shape):
            self.total = total.matrix()
            return
        self._sides = (
            _Side([*total.left, *(pair.B for pair in self._others)]),
            _Side([*total.right, *(pair.A.T for pair in self._others)]),
        )
        left, right = (side.coordinates[:, : total.width] for side in self._sides)
        self._begin, self._widths = total.width, [block.shape[1] for block in total.left]
        self.total = left @ right.T

    def other(self, index: int) -> Tensor:
        """The product of one of the other pairs, in these coordinates."""
        pair = self._others[index]
        if self._sides is None:
            return pair.product()
        begin = self._begin + sum(before.rank for before in self._others[:index])
        left, right = (side.coordinates[:, begin : begin + pair.rank] for side in self._sides)
        found: Tensor = left @ right.T
        return found

    @property
    def is_dense(self) -> bool:
        """Whether coordinates are the original ones."""
        return self._sides is None

    def distances(self, count: int, ranks: Collection[int]) -> Distances:
        """Of the total to the first `count` of the other pairs, and what ranks leave out of it."""
        spectrum = torch.linalg.svdvals(self.total).square()
        errors2 = [square(self.other(index) - self.total) for index in range(count)]
        return Distances(square(self.total), errors2, {rank: float(spectrum[rank:].sum()) for rank in ranks})

    def spread(self, weights: Sequence[float]) -> float:
        """`Σ w_k ‖B_k A_k − Σ w_v B_v A_v‖²` of the stacked pairs of which the total was made with these weights."""
        if self._sides is None:
            raise ValueError("the spread about a dense sum is taken about one of its pairs: Spread")
        left, right = (side.coordinates[:, : self._begin].split(self._widths, dim=1) for side in self._sides)
        return math.fsum(  # the left columns carry the weight
            weight * square(own / weight @ other.T - self.total)
            for weight, own, other in zip(weights, left, right, strict=True)
            if weight
        )

    def lift(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Columns in these coordinates as columns in the original ones, left (d_out × k) and right (d_in × k)."""
        if self._sides is None:
            return left, right
        return self._sides[0].lift(left), self._sides[1].lift(right)


class _Side:
    """Columns (d × n, n < d) as coordinates (n × n) in an orthonormal basis, which is only formed where it must be."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._columns = torch.cat(list(blocks), dim=1)
        self.coordinates = torch.linalg.qr(self._columns, mode="r").R

    def lift(self, vectors: Tensor) -> Tensor:
        """`Q @ vectors`: by solving with the triangle where that is safe, at half the cost of forming Q."""
        diagonal = self.coordinates.diagonal().abs()
        if diagonal.numel() and diagonal.min() > _SOLVABLE * diagonal.max():
            vectors = torch.linalg.solve_triangular(self.coordinates, vectors, upper=True)
            return self._columns @ vectors
        basis: Tensor = torch.linalg.qr(self._columns).Q
        return basis @ vectors


@dataclass(frozen=True)
class Triples:
    """Leading singular directions `U diag(S) Vᵀ` of a sum of products: `U` (d_out × r), `S` (r), `Vh` (r × d_in)."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    @classmethod
    def within(cls, found: Subspace, rank: int) -> Triples:
        """The first `rank` directions of a subspace."""
        return cls(found.basis @ found.left[:, :rank], found.S[:rank], found.Vh[:rank])

    def first(self, count: int) -> Triples:
        """The leading `count` directions of these."""
        return Triples(self.U[:, :count], self.S[:count], self.Vh[:count])

    def with_first(self, columns: Tensor, rows: Tensor) -> Triples:
        """These, with the first k of them those of a product of columns (d_out × k) and orthonormal rows (k × d_in)."""
        k = len(rows)
        basis, triangle = torch.linalg.qr(columns)
        left, S, Vh = torch.linalg.svd(triangle)
        return Triples(
            torch.cat([basis @ left, self.U[:, k:]], dim=1),
            torch.cat([S, self.S[k:]]),
            torch.cat([Vh @ rows, self.Vh[k:]]),
        )

    def balanced(self) -> Factors:
        """`B = U√S`, `A = √S Vᵀ`: the split with equal norms on both sides.

        In directions in which nothing was learned (S = 0) B is zero and A keeps the unit row of `Vᵀ`, so that the
        product is unchanged and the direction can still be trained: with both zero its gradient would vanish for ever.
        """
        root = self.S.clamp_min(0).sqrt()
        scale_a = torch.where(self.learned(), root, torch.ones_like(root))
        scale_b = torch.where(self.learned(), root, torch.zeros_like(root))
        return Factors(self.U * scale_b, scale_a[:, None] * self.Vh)

    def on_b(self) -> Factors:
        """`B = U S`, `A = Vᵀ`: all of the size on B, rows of A orthonormal."""
        return Factors(self.U * torch.where(self.learned(), self.S, torch.zeros_like(self.S)), self.Vh)

    def learned(self) -> Tensor:
        """Which of the r directions carry anything (r, bool)."""
        if not self.S.numel() or self.S.max() <= 0:
            return torch.zeros_like(self.S, dtype=torch.bool)
        return _NULL * self.S.max() < self.S


@dataclass(frozen=True)
class TruncatedSVD(Triples):
    """The best rank-r approximation of a sum of products, and the singular values it leaves out: `tail`, descending."""

    tail: Tensor

    def first(self, count: int) -> TruncatedSVD:
        """The leading `count` directions of these; the others join the tail."""
        tail = torch.cat([self.S[count:], self.tail])
        return TruncatedSVD(self.U[:, :count], self.S[:count], self.Vh[:count], tail)


def mean(tensors: Iterable[Tensor], weights: Tensor) -> Tensor:
    """`Σ w_k T_k` for tensors of one shape, accumulated in float64 in the order given, one at a time.

    Raises:
        ValueError: no tensor.
    """
    total: Tensor | None = None
    for weight, tensor in zip(weights.tolist(), tensors, strict=True):
        if total is None:
            total = torch.zeros_like(tensor, dtype=torch.float64)
        total.add_(tensor.to(torch.float64), alpha=weight)
    if total is None:
        raise ValueError("a mean needs at least one tensor")
    return total


def mean_factors(factors: Iterable[Factors], weights: Tensor) -> Factors:
    """`B̄ = Σ w_u B_u` and `Ā = Σ w_u A_u` (equal ranks), in float64, one pair at a time."""
    total: Factors | None = None
    for weight, pair in zip(weights.tolist(), factors, strict=True):
        if total is None:
            total = Factors(*(torch.zeros_like(t, dtype=torch.float64) for t in (pair.B, pair.A)))
        total.B.add_(pair.B.to(torch.float64), alpha=weight)
        total.A.add_(pair.A.to(torch.float64), alpha=weight)
    if total is None:
        raise ValueError("a mean needs at least one pair")
    return total


def product_norm(pair: Factors) -> float:
    """`‖B A‖_F` in float64 (through the r × r triangles of both factors, so that no square is taken of a small sum)."""
    left = torch.linalg.qr(pair.B.to(torch.float64), mode="r").R
    right = torch.linalg.qr(pair.A.to(torch.float64).T, mode="r").R
    return float((left @ right.T).norm())


def keep_trainable(pair: Factors, before: Factors) -> Factors:
    """The same product, with the rows of A that are zero taken from `before` where B's column is zero too.

    With both zero a direction's gradient would vanish for ever. Missing indices are added up to the rank of `before`.
    """
    padded = pair.at_rank(max(pair.rank, before.rank))
    idle = (padded.B == 0).all(dim=0) & (padded.A == 0).all(dim=1)
    if not idle.any():
        return padded
    rows = before.at_rank(padded.rank).A.to(padded.A)
    return Factors(padded.B, torch.where(idle[:, None], rows, padded.A))


def fresh_factors(
    shape: tuple[int, int], rank: int, kind: Kind = "linear", generator: torch.Generator | None = None
) -> Factors:
    """Factors of a product (d_out × d_in) as every adapter starts, in fp32 on the CPU: B zero, and A uniform within
    ±1/√d_in, or standard normal for an embedding, whose rows are looked up and not summed.

    Drawn from torch's global generator where none is given. PEFT draws the A of linear layers before round one: the
    same distribution of another stream, on which the bits of finished runs depend.
    """
    d_out, d_in = shape
    if kind in ("embedding", "hira_embedding"):
        drawn = torch.randn(rank, d_in, generator=generator, device="cpu")
    else:
        drawn = (2 * torch.rand(rank, d_in, generator=generator, device="cpu") - 1) / d_in**0.5
    return Factors(drawn.new_zeros(d_out, rank), drawn)
