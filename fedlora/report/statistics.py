"""The statistics of a comparison: intervals over seeds, paired differences, correlations. Undefined values say why."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # type: ignore[import-untyped]  # scipy.stats, a second of imports, comes with its first use

LEVEL = 0.95
POWER = 0.8
FEWEST = 3
"""Values of which there is an interval."""
_MOST_SEEDS = 1000
_EXACT = 7
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """Mean of `n` values and its confidence interval; NaN where there is none (fewer than three values)."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...] = ()
    """What it is of, without missing ones."""

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)


def interval(
    values: Sequence[float], level: float = LEVEL, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    """Mean and interval of values from independent seeds; missing ones (NaN) are left out.

    Student's t with n - 1 degrees of freedom from three values on: its factor (4.3 for three) makes up for a spread
    that is itself an estimate, where a bootstrap of three seeds covers the truth in three cases of four. What lies
    beyond `bounds` is cut off, which loses only what the truth cannot be. Of two values there is no interval (the
    factor is 12.7): they are shown.
    """
    present = tuple(float(value) for value in values if not math.isnan(value))
    n = len(present)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    mean = float(np.mean(present))
    if n < FEWEST:
        return Interval(mean, math.nan, math.nan, present)
    half = float(scipy.stats.t.ppf((1 + level) / 2, n - 1) * np.std(present, ddof=1) / math.sqrt(n))
    return Interval(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), present)


def bootstrap(
    clients: Sequence[Sequence[float]], level: float = LEVEL, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over clients and seeds: seeds are drawn with replacement, of each its clients.

    The second view beside `interval`: how far the mean moves if these same seeds, and their clients, had been drawn in
    another mixture. With few seeds it is too narrow for the seeds' part, so it decides nothing here. The hierarchical
    bootstrap of Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8.

    Args:
        clients: for each seed, the clients' values; missing ones (NaN) are left out.
        level: share of the draws inside.
        draws: how many.
        seed: of the draws.

    Returns:
        Both ends; NaN with fewer than two seeds.
    """
    known = [np.array([v for v in each if not math.isnan(v)], dtype=float) for each in clients]
    known = [each for each in known if len(each)]
    if len(known) < 2:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    seeds = random.integers(len(known), size=(draws, len(known)))
    means = np.empty(seeds.shape)
    for place, values in enumerate(known):
        drawn = seeds == place
        means[drawn] = random.choice(values, (int(drawn.sum()), len(values))).mean(axis=1)
    low, high = np.quantile(means.mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def redrawn(clients: Sequence[Sequence[float]]) -> Interval:
    """Mean over seeds of the mean over clients, with the interval of `bootstrap`; NaN where nothing is known.

    Args:
        clients: for each seed, the clients' values.
    """
    means = [float(np.mean(known)) for each in clients if (known := [v for v in each if not math.isnan(v)])]
    return Interval(float(np.mean(means)) if means else math.nan, *bootstrap(clients), tuple(means))


@dataclass(frozen=True)
class Paired:
    """A difference (ours minus the other's), its interval, and the p-value of the t-test: seed by seed, or of means."""

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
    return Paired(found, float(scipy.stats.ttest_1samp(differences, 0.0).pvalue))


def welch(ours: Sequence[float], other: Sequence[float]) -> Paired:
    """Two-sided t-test of two means of independent values whose spreads may differ (Welch 1947), as scipy has it.

    Missing values (NaN) are left out. The interval is that of the difference of the means (ours minus the other's).
    """
    a, b = ([float(value) for value in values if not math.isnan(value)] for values in (ours, other))
    if not a or not b:
        return Paired(Interval(math.nan, math.nan, math.nan), math.nan, "nothing was measured")
    difference = float(np.mean(a) - np.mean(b))
    if len(a) < 2 or len(b) < 2:
        return Paired(Interval(difference, math.nan, math.nan), math.nan, "one seed: two of each are needed")
    scale = max(map(abs, (*a, *b, 1.0)))
    if max(np.ptp(a), np.ptp(b)) <= _ROUNDING * scale:
        return Paired(Interval(difference, math.nan, math.nan), math.nan, "neither varies over seeds")
    found = scipy.stats.ttest_ind(a, b, equal_var=False)
    limits = found.confidence_interval(LEVEL)
    return Paired(Interval(difference, float(limits.low), float(limits.high)), float(found.pvalue))


def more_seeds(found: Paired, tests: int = 1, level: float = LEVEL, power: float = POWER) -> int | None:
    """How many seeds more would tell two apart, if they differ by what they differ by now.

    The smallest number of seeds at which a two-sided paired t-test finds the present mean difference, with its present
    spread, with this power (noncentral t); the error is shared among `tests` (Bonferroni). None where that is not known
    (fewer than two common seeds, no difference or no spread), or beyond a thousand.
    """
    differences = np.array(found.difference.values)
    if len(differences) < 2 or math.isnan(found.p):
        return None
    effect = abs(float(differences.mean())) / float(differences.std(ddof=1))
    alpha = (1 - level) / tests
    n = np.arange(len(differences), _MOST_SEEDS + 1)
    # The other tail is left out: where the power is anywhere near what is asked for it is nothing.
    reached = scipy.stats.nct.sf(scipy.stats.t.ppf(1 - alpha / 2, n - 1), n - 1, effect * np.sqrt(n)) >= power
    return int(np.argmax(reached)) if reached.any() else None


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
    if n < FEWEST:
        points = "point" if n == 1 else "points"
        return Correlation(n, *(math.nan,) * 4, f"{n} {points}: at least {FEWEST} are needed")
    a, b = np.array(pairs, dtype=float).T
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Correlation(n, *(math.nan,) * 4, "one of the two does not vary")
    linear = scipy.stats.pearsonr(a, b)
    ranked = float(scipy.stats.spearmanr(a, b).statistic)
    return Correlation(n, float(linear.statistic), float(linear.pvalue), ranked, _spearman_p(a, b, ranked))


def _spearman_p(a: np.ndarray, b: np.ndarray, statistic: float) -> float:
    if len(a) > _EXACT:
        return float(scipy.stats.spearmanr(a, b).pvalue)
    ranks_a, ranks_b = scipy.stats.rankdata(a), scipy.stats.rankdata(b)
    centred = ranks_a - ranks_a.mean()
    scale = float(np.sqrt((centred**2).sum() * ((ranks_b - ranks_b.mean()) ** 2).sum()))
    orders = np.array(list(itertools.permutations(ranks_b)))
    reached = np.abs(orders @ centred) / scale >= abs(statistic) - 1e-9
    return float(reached.mean())
