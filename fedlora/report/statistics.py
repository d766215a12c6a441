"""The statistics of a comparison: intervals over seeds, paired differences, correlations. Undefined values say why."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

LEVEL = 0.95
_FEWEST_POINTS = 3
_EXACT = 7
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values and its confidence interval (Student t, n - 1 degrees of freedom); NaN where undefined."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and interval of values from independent seeds; missing ones (NaN) are left out, one has no interval."""
    present = np.array([value for value in values if not math.isnan(value)], dtype=float)
    n = len(present)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(present.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * present.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n)


@dataclass(frozen=True)
class Paired:
    """Mean of the differences (ours minus the other's) seed by seed, its interval, and the p-value of the t-test."""

    difference: Interval
    p: float
    why: str = ""
    """Why there is no p-value."""


def paired(ours: Mapping[Hashable, float], other: Mapping[Hashable, float]) -> Paired:
    """Two-sided paired t-test over the seeds that both have."""
    common = [seed for seed in ours if seed in other and not math.isnan(ours[seed]) and not math.isnan(other[seed])]
    differences = [ours[seed] - other[seed] for seed in common]
    found = interval(differences)
    if len(common) < 2:
        return Paired(found, math.nan, "no common seed" if not common else "one common seed: two are needed")
    scale = max(abs(value) for value in (*(ours[s] for s in common), *(other[s] for s in common), 1.0))
    if np.ptp(differences) <= _ROUNDING * scale:
        same = abs(found.mean) <= _ROUNDING * scale
        why = "equal in every seed" if same else "the same difference in every seed: it has no spread to compare with"
        return Paired(found, math.nan, why)
    return Paired(found, float(stats.ttest_1samp(differences, 0.0).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several tests at once, in the order given; NaN stays NaN and does not count."""
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True)
class Correlation:
    """Pearson's and Spearman's coefficient of `n` points with their two-sided p-values; NaN where undefined."""

    n: int
    pearson: float
    pearson_p: float
    spearman: float
    spearman_p: float
    why: str = ""
    """Why there is none."""


def correlation(xs: Sequence[float], ys: Sequence[float]) -> Correlation:
    """Correlation of paired values; pairs with a missing one (NaN) are left out.

    Spearman's p-value is exact (all permutations) up to seven points, where the usual approximation is poor.
    """
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if not (math.isnan(x) or math.isnan(y))]
    n = len(pairs)
    if n < _FEWEST_POINTS:
        points = "point" if n == 1 else "points"
        return Correlation(n, *(math.nan,) * 4, f"{n} {points}: at least {_FEWEST_POINTS} are needed")
    a, b = np.array(pairs, dtype=float).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(n, *(math.nan,) * 4, "one of the two does not vary")
    linear = stats.pearsonr(a, b)
    ranked = float(stats.spearmanr(a, b).statistic)
    return Correlation(n, float(linear.statistic), float(linear.pvalue), ranked, _spearman_p(a, b, ranked))


def _spearman_p(a: np.ndarray, b: np.ndarray, statistic: float) -> float:
    if len(a) > _EXACT:
        return float(stats.spearmanr(a, b).pvalue)
    ranks_a, ranks_b = stats.rankdata(a), stats.rankdata(b)
    centred = ranks_a - ranks_a.mean()
    scale = float(np.sqrt((centred**2).sum() * ((ranks_b - ranks_b.mean()) ** 2).sum()))
    orders = np.array(list(itertools.permutations(ranks_b)))
    reached = np.abs(orders @ centred) / scale >= abs(statistic) - 1e-9
    return float(reached.mean())
