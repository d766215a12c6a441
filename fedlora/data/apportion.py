"""Whole numbers in given proportions: what stratified splits and dealing to clients have in common."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def largest_remainder(total: int, weights: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Integers that sum to `total`, each less than one away from its proportional share.

    Args:
        total: what is dealt out, at least 0.
        weights: non-negative, not all zero; a weight of zero gets nothing. Equal remainders go to the earlier entry.
    """
    shares = np.asarray(weights, dtype=np.float64)
    quotas = total * shares / shares.sum()
    counts: npt.NDArray[np.int64] = np.floor(quotas).astype(np.int64)
    order = np.argsort(-np.where(shares > 0, quotas - counts, -1.0), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts
