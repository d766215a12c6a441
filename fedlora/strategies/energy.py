"""How many singular directions carry a given share of a matrix's energy."""

from __future__ import annotations

import torch
from torch import Tensor


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
