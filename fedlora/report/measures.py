"""Measures that decide besides the final score: the score at a budget, what a target costs, the area under the curve.

Curves are a run's: rounds with a score, its cumulative bytes and its cumulative wall time. A score between two rounds
is that of the earlier one, since nothing better was there yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from fedlora import metrics
from fedlora.objective import Score
from fedlora.report.decision import Condition, Standing
from fedlora.report.frames import Comparison

TARGET = 0.9
"""Share of the best final score of a condition that counts as reached; where there is no share of it, as of a loss, of
the way to it from the score before training."""


@dataclass(frozen=True)
class Curve:
    """One run: its score after each scored round, and what had been spent by then."""

    rounds: np.ndarray
    score: np.ndarray
    megabytes: np.ndarray
    seconds: np.ndarray
    """NaN where a resumed round's are not known."""
    sign: int = 1
    """1 where a higher score is better, else -1."""

    def at(self, spent: np.ndarray, budget: float) -> float:
        """The score when no more than a budget was spent; NaN where that is not known."""
        within = np.flatnonzero(spent <= budget * (1 + 1e-9))
        return float(self.score[within[-1]]) if len(within) else math.nan

    def until(self, target: float, spent: np.ndarray) -> float:
        """What was spent when the score first reached a target; infinite where it never did, NaN without a target."""
        reached = np.flatnonzero(self.sign * self.score >= self.sign * target)
        return float(spent[reached[0]]) if len(reached) else math.nan if math.isnan(target) else math.inf

    @property
    def area(self) -> float:
        """The mean score over the rounds (trapezoids), NaN with one."""
        if len(self.rounds) < 2:
            return math.nan
        return float(np.trapezoid(self.score, self.rounds) / (self.rounds[-1] - self.rounds[0]))


@dataclass(frozen=True)
class Measured:
    """A choice's measures, means over its seeds; infinite where a target was not reached in every seed."""

    standing: Standing
    at_megabytes: float
    at_seconds: float
    rounds_to: float
    megabytes_to: float
    seconds_to: float
    area: float


@dataclass(frozen=True)
class Measures:
    """The measures of a condition, and the budgets and the target that they are for."""

    criterion: Score
    megabytes: float
    """The budget: what the most frugal choice sends in the whole run, so that every choice has a score there."""
    seconds: float
    """The same of wall time in rounds of training."""
    target: float
    """`TARGET` of the best final score."""
    choices: Sequence[Measured]


def curves(comparison: Comparison) -> dict[str, Curve]:
    """The curve of each run, by run id."""
    rounds = comparison.rounds.sort_values("round")
    name, sign = f"{metrics.GLOBAL}{comparison.criterion.name}", comparison.criterion.sign
    if name not in rounds:
        return {}
    found = {}
    for run, rows in rounds.groupby("run_id"):
        seconds = _seconds(rows)
        scored = rows[name].notna().to_numpy()
        sent = rows.get(metrics.BYTES_TOTAL, pd.Series(math.nan, rows.index)).to_numpy(float) / 1e6
        score = rows[name].to_numpy(float)
        number = rows["round"].to_numpy(float)
        found[str(run)] = Curve(number[scored], score[scored], sent[scored], seconds[scored], sign)
    return found


def _seconds(rows: pd.DataFrame) -> np.ndarray:
    """Cumulative wall time of training; not known from a resumed round on."""
    if metrics.TIME_ROUND not in rows:
        return np.full(len(rows), math.nan)
    spent = rows[metrics.TIME_ROUND].to_numpy(float)
    if metrics.TIME_RESUMED in rows:
        spent = np.where(rows[metrics.TIME_RESUMED].to_numpy(float) > 0, math.nan, spent)
    return np.cumsum(np.where(rows["round"].to_numpy() > 0, spent, 0.0))


def of(condition: Condition, found: Mapping[str, Curve]) -> Measures:
    """The measures of a condition's choices.

    Args:
        condition: its standings.
        found: the curves of all runs.
    """
    own = [[found[run] for run in each.setting.seeds.values() if run in found] for each in condition.standings]
    every = [curve for group in own for curve in group if len(curve.rounds)]
    megabytes = min((curve.megabytes[-1] for curve in every), default=math.nan)
    seconds = min((float(np.nanmax(c.seconds)) for c in every if not np.isnan(c.seconds).all()), default=math.nan)
    target = _target(condition, every)
    choices = [
        Measured(
            each,
            at_megabytes=_mean([curve.at(curve.megabytes, megabytes) for curve in group]),
            at_seconds=_mean([curve.at(curve.seconds, seconds) for curve in group]),
            rounds_to=_mean([curve.until(target, curve.rounds) for curve in group]),
            megabytes_to=_mean([curve.until(target, curve.megabytes) for curve in group]),
            seconds_to=_mean([curve.until(target, curve.seconds) for curve in group]),
            area=_mean([curve.area for curve in group]),
        )
        for each, group in zip(condition.standings, own, strict=True)
    ]
    return Measures(condition.criterion, megabytes, seconds, target, choices)


def _is_share(criterion: Score) -> bool:
    """Whether the target is a share of the best final score: where 0 is nothing at all, and more is better."""
    return criterion.higher_is_better and criterion.low == 0


def target_words(criterion: Score) -> str:
    """What the target is."""
    share = f"{TARGET * 100:g} %"
    if _is_share(criterion):
        return f"{share} of the best final {criterion.title}"
    return f"{share} of the way from the {criterion.title} before training to the best final one"


def _target(condition: Condition, every: Sequence[Curve]) -> float:
    best = condition.best.score.mean
    if _is_share(condition.criterion):
        return TARGET * best
    start = _mean([float(curve.score[0]) for curve in every if curve.rounds[0] == 0])
    return start + TARGET * (best - start)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def front(points: Sequence[tuple[float, float]], sign: int = 1) -> list[int]:
    """Which of (cost, score) no other has for less or better: the Pareto front, the cheapest first.

    Points with something unknown (NaN) are on no front.

    Args:
        points: cost and score of each.
        sign: 1 where a higher score is better, else -1.
    """
    known = [index for index, point in enumerate(points) if not any(map(math.isnan, point))]
    best, kept = -math.inf, []
    for index in sorted(known, key=lambda i: (points[i][0], -sign * points[i][1])):
        if sign * points[index][1] > best:
            best = sign * points[index][1]
            kept.append(index)
    return kept
