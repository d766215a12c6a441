"""Least squares in one weight per client, by products with the clients' factors alone: LSQR on rows that are brought to
float64 a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedlora.strategies.simplex import Applied

BLOCK = 2**16
"""Numbers that are brought to float64 at a time, few enough to stay in the processor's cache."""
_WIDE = 2**21
"""The same where blocks are multiplied with each other."""
KEPT = 2**23
"""Numbers of a factor, of all clients together, up to which they are kept in float64 (64 MB)."""
_SETTLED = 1e-10
"""LSQR's atol and btol; the objective is then nearer to its minimum by far, as its gradient vanishes there."""
_SLOW = 150
"""Iterations after which the triangle of the uploads' inner products is worth its cost, cubic in the clients."""
_MOST = 3000
"""Iterations at which one gives up, with what they gained."""
_SINGULAR = 1e-6
"""Ratio of the smallest to the largest on a triangle's diagonal, below which it is not solved with."""


class Rows:
    """One factor of every client as a row of its numbers (U × d·r). Products are in float64; where the rows are many
    they stay in the uploads' type, and `BLOCK` numbers are converted at a time."""

    def __init__(self, stacked: Tensor) -> None:
        self.shape = tuple(stacked.shape[1:])
        self.slow = False
        rows = stacked.reshape(len(stacked), -1)
        self._rows = rows.to(torch.float64) if rows.numel() <= KEPT else rows

    def blocks(self, most: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and these in float64 until the next are asked for: about `most` numbers."""
        clients, numbers = self._rows.shape
        if self._rows.dtype == torch.float64:
            yield slice(0, clients), self._rows
            return
        height = max(1, most // numbers)
        room = self._rows.new_empty((height, numbers), dtype=torch.float64)
        for begin in range(0, clients, height):
            chosen = slice(begin, min(begin + height, clients))
            yield chosen, room[: chosen.stop - begin].copy_(self._rows[chosen])

    def __len__(self) -> int:
        return len(self._rows)

    def sum(self, x: Tensor) -> Tensor:
        """`Σ x_u F_u`, in the factor's shape."""
        total = self._rows.new_zeros(self._rows.shape[1], dtype=torch.float64)
        for chosen, block in self.blocks():
            total.addmv_(block.T, x[chosen])
        return total.view(self.shape)

    def dots(self, matrix: Tensor) -> Tensor:
        """`⟨F_u, matrix⟩` for every client (U)."""
        wanted, found = matrix.reshape(-1), self._rows.new_empty(len(self._rows), dtype=torch.float64)
        for chosen, block in self.blocks():
            torch.mv(block, wanted, out=found[chosen])
        return found

    @cached_property
    def triangle(self) -> Tensor | None:
        """R (U × U) of `G = RᵀR`, G all inner products, where clients are fewer than numbers and far from dependent."""
        clients, numbers = self._rows.shape
        if clients >= numbers:
            return None
        gram = self._rows.new_empty((clients, clients), dtype=torch.float64)
        for chosen, block in self.blocks(_WIDE):
            for others, other in self.blocks(_WIDE):
                if others.start <= chosen.start:
                    gram[chosen, others] = block @ other.T
        factor, failed = torch.linalg.cholesky_ex(gram)
        diagonal = factor.diagonal()
        return None if failed or diagonal.min() < _SINGULAR * diagonal.max() else factor.T


class Columns:
    """`x ↦ (Σ x_u F_u)` times a triangle of the other factor, on the side where that stands."""

    def __init__(self, rows: Rows, triangle: Tensor, before: bool) -> None:
        self.rows, self.triangle, self._before = rows, triangle, before
        self.size = math.prod(rows.shape)

    def times(self, x: Tensor) -> Tensor:
        found = self.rows.sum(x)
        return self.triangle @ found if self._before else found @ self.triangle.T

    def dots(self, matrix: Tensor) -> Tensor:
        return self.rows.dots(self.triangle.T @ matrix if self._before else matrix @ self.triangle)

    def mean_square(self) -> float:
        """The mean over clients of `‖F_u T‖²`: of the diagonal of the normal equations."""
        total = 0.0
        for _, block in self.rows.blocks():
            each = block.view(-1, *self.rows.shape)
            total += float((self.triangle @ each if self._before else each @ self.triangle.T).square().sum())
        return total / len(self.rows)


class Half(Applied):
    """Least squares in one of p, q with the other fixed, over all modules.

    With q fixed and `Âᵀ = QT`, Q orthonormal (d_in × r), what depends on p is the distance of `B̂Tᵀ` to `W*Q`
    (d_out × r): a column of d_out·r numbers for each client.
    """

    def __init__(self, columns: Sequence[Columns], wanted: Sequence[Tensor], w: Tensor, ridge: float) -> None:
        self.columns, self.wanted, self._w, self._ridge = columns, wanted, w, ridge

    def __matmul__(self, x: Tensor) -> Tensor:
        """The normal equations' matrix times x."""
        return torch.stack([self._ridge * x, *(each.dots(each.times(x)) for each in self.columns)]).sum(0)

    def right(self) -> Tensor:
        found = zip(self.columns, self.wanted, strict=True)
        return torch.stack([self._ridge * self._w, *(each.dots(wanted) for each, wanted in found)]).sum(0)

    def largest(self) -> float:
        """The largest eigenvalue and a twentieth more, by power iteration from even weights."""
        x = torch.full_like(self._w, len(self._w) ** -0.5)
        for _ in range(20):
            x = self @ x
            size = float(x.norm())
            if size == 0:
                return float(self._ridge)
            x = x / size
        return 1.05 * size

    def minimise(self, start: Tensor | None) -> Tensor:
        """The minimiser, of minimum norm unless `start` is given, which then must lie where that does."""
        if self._ridge:
            return self._lsqr(self._w, math.sqrt(self._ridge))[0]
        if start is not None and any(_singular(each.triangle) for each in self.columns):
            start = None  # what was the least norm beside another factor need not be so beside this one
        rows = self.columns[0].rows
        if not rows.slow:
            start, settled = self._lsqr(start, most=_SLOW)
            if settled:
                return start
            rows.slow = True
        return self._lsqr(start, triangle=rows.triangle if len(self.columns) == 1 else None)[0]

    def _lsqr(
        self, start: Tensor | None, damp: float = 0.0, most: int = _MOST, triangle: Tensor | None = None
    ) -> tuple[Tensor, bool]:
        """By LSQR from `start`, and whether it settled; in the coordinates of a triangle (`x = start + R⁻¹z`) or in
        those of the weights."""
        sizes = [each.size for each in self.columns]

        def within(z: Tensor) -> Tensor:
            if triangle is None:
                return z
            found: Tensor = torch.linalg.solve_triangular(triangle, z[:, None], upper=True)
            return found[:, 0]

        def times(z: np.ndarray) -> np.ndarray:
            x = within(self._own(z))
            return torch.cat([each.times(x).reshape(-1) for each in self.columns]).cpu().numpy()

        def dots(y: np.ndarray) -> np.ndarray:
            parts = torch.split(self._own(y), sizes)
            pairs = zip(self.columns, parts, strict=True)
            found = torch.stack([each.dots(part.view(each.rows.shape)) for each, part in pairs]).sum(0)
            if triangle is not None:
                found = torch.linalg.solve_triangular(triangle.T, found[:, None], upper=False)[:, 0]
            return found.cpu().numpy()

        from scipy.sparse import linalg  # type: ignore[import-untyped]  # half a second of every start otherwise

        operator = linalg.LinearOperator((sum(sizes), len(self._w)), matvec=times, rmatvec=dots, dtype=np.float64)
        rest = torch.cat([wanted.reshape(-1) for wanted in self.wanted])
        if start is not None:
            rest = rest - torch.cat([each.times(start).reshape(-1) for each in self.columns])
        z, reason = linalg.lsqr(operator, rest.cpu().numpy(), damp, _SETTLED, _SETTLED, conlim=0, iter_lim=most)[:2]
        step = within(self._own(z))
        return step if start is None else start + step, reason != 7

    def _own(self, vector: np.ndarray) -> Tensor:
        """LSQR's numbers where the uploads are."""
        return torch.from_numpy(vector.reshape(-1)).to(self._w.device)


def _singular(triangle: Tensor) -> bool:
    values = torch.linalg.svdvals(triangle)
    return bool(values[-1] <= _SINGULAR * values[0])
