"""Quadratic minimisation over weights that are non-negative and sum to one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_STEPS = 500
_SETTLED = 1e-12


class Applied(Protocol):
    """A symmetric matrix that is only ever applied."""

    def __matmul__(self, x: Tensor, /) -> Tensor: ...


def project_to_simplex(point: Tensor) -> Tensor:
    """The nearest (U) vector that is non-negative with sum one (by the sorted cumulative sums)."""
    ordered = point.sort(descending=True).values
    excess = ordered.cumsum(0) - 1
    counts = torch.arange(1, len(point) + 1, dtype=point.dtype, device=point.device)
    support = int((ordered - excess / counts > 0).sum())
    return (point - excess[support - 1] / support).clamp_min(0)


def minimise_on_simplex(H: Applied, h: Tensor, start: Tensor, largest: float | None = None) -> Tensor:
    """The minimiser of `xᵀHx − 2xᵀh` (H symmetric, positive semi-definite) on the simplex, by projected gradient steps
    with momentum from `start`; never worse than `start`.

    `largest` bounds the eigenvalues of H from above; it must be given where H is not a matrix.
    """
    lipschitz = float(torch.linalg.matrix_norm(H, 2)) if isinstance(H, Tensor) else largest
    if not lipschitz:
        return start
    x = y = start
    speed = 1.0
    for _ in range(_STEPS):
        new = project_to_simplex(y - (H @ y - h) / lipschitz)
        faster = (1 + (1 + 4 * speed * speed) ** 0.5) / 2
        y = new + (speed - 1) / faster * (new - x)
        settled = float((new - x).abs().max()) < _SETTLED
        x, speed = new, faster
        if settled:
            break
    return x if _value(H, h, x) <= _value(H, h, start) else start


def _value(H: Applied, h: Tensor, x: Tensor) -> float:
    return float(x @ (H @ x) - 2 * x @ h)
