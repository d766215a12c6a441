"""How far products are from each other, without forming them: about the one of them with the most weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedlora.adapter.factors import Frame, ProductSum
from fedlora.adapter.leading import square
from fedlora.adapter.weights import Factors

_BATCH = 2**19
"""Numbers of a factor, of several clients, that are worked on at a time."""


def apart(pair: Factors, other: Factors) -> float:
    """`‖BA − B'A'‖²` of two pairs, in coordinates of their own."""
    return square(Frame(ProductSum.of([pair, other], [1.0, -1.0])).total)


class Spread:
    """`Σ w_k ‖P_k − W‖²` of products P_k with the mean W, from what they differ by from one of them, H.

    `Σ w_k ‖P_k − H‖² − ‖H − W‖²`: where H is the product with the most weight the terms are of the spread's own size
    (at most one over that weight larger), so little cancels even where products are nearly equal.

    Args:
        about: H, in float64.
        many: whether to take pairs several at a time, with H's own directions split off on either side so that nothing
            large is subtracted; one at a time in coordinates of both pairs otherwise.
    """

    def __init__(self, about: Factors, many: bool) -> None:
        self.about = about
        self._terms: list[float] = []
        self._waiting: list[tuple[float, Factors]] = []
        self._most = max(1, _BATCH // max(about.B.numel(), about.A.numel())) if many else 0
        if many:
            self._left, self._right = torch.linalg.qr(about.B).Q, torch.linalg.qr(about.A.T).Q
            self._own = self._left.T @ about.B @ about.A

    def add(self, weight: float, pair: Factors) -> None:
        """One more product (float64) with its weight."""
        if not weight:
            return
        if not self._most:
            self._terms.append(weight * apart(pair, self.about))
            return
        self._waiting.append((weight, pair))
        if len(self._waiting) >= self._most:
            self._take()

    def of(self, error2: float) -> float:
        """The spread, given `‖H − W‖²`."""
        self._take()
        return max(math.fsum(self._terms) - error2, 0.0)

    def _take(self) -> None:
        if not self._waiting:
            return
        rank = max(pair.rank for _, pair in self._waiting)
        padded = [pair.at_rank(rank) for _, pair in self._waiting]
        B, A = torch.stack([pair.B for pair in padded]), torch.stack([pair.A for pair in padded])
        found = _apart(B, A, self._left, self._right, self._own)
        self._terms += [weight * each for (weight, _), each in zip(self._waiting, found.tolist(), strict=True)]
        self._waiting = []


def _apart(B: Tensor, A: Tensor, left: Tensor, right: Tensor, own: Tensor) -> Tensor:
    """`‖B_kA_k − H‖²` (n) of pairs (n × d_out × r, n × r × d_in), with orthonormal columns of H on either side and
    `own = leftᵀH`: of what is in H's columns, of what is in its rows alone, and of what is in neither."""
    inside = left.T @ B
    beside = B - left @ inside
    along = A @ right
    across = A - along @ right.T
    neither = (beside.mT @ beside) * (across @ across.mT)
    return (
        (inside @ A - own).square().sum((1, 2))
        + (beside @ along).square().sum((1, 2))
        + neither.sum((1, 2)).clamp_min(0)
    )
