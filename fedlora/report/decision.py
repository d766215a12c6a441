"""Which choice to take: choices compared within each condition, and how they fare across conditions.

A comparison of runs answers a question only where the world is the same for all: what the user chose is compared within
a condition (`roles`), seed by seed. Across conditions choices are ranked by places and by regret, which do not mix a
hard condition's score with an easy one's: a mean over all would turn the order round where a choice is missing in
the hard one (Simpson's paradox).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import scipy  # type: ignore[import-untyped]  # scipy.stats, a second of imports, comes with its first use

from fedlora.errors import ConfigError, FedloraError
from fedlora.objective import Score
from fedlora.report import frames, statistics, tables
from fedlora.report.costs import COSTS
from fedlora.report.frames import Comparison, Setting
from fedlora.report.statistics import Interval, Paired
from fedlora.strategies import registry
from fedlora.strategies.base import Family

ALPHA = 0.05
"""p-values below it are called a difference."""
ENDS = ("local", "oracle")
"""Strategies at the ends of the scale: no aggregation, and aggregation without error."""


@dataclass(frozen=True)
class Standing:
    """A choice within a condition."""

    choice: str
    setting: Setting
    results: Mapping[str, Interval]
    """Every result (`tables.names`) over its seeds."""
    score: Interval
    """The result that decides."""
    by_seed: Mapping[Any, float]
    """The same in each seed."""
    place: float
    """1 for the best mean score; equal ones share the mean of their places."""
    regret: float
    """How much better the best choice of the condition is, in the seeds that both have."""
    paired: Paired | None
    """Against the best; None for the best itself."""
    holm: float
    """The p-value corrected for all comparisons with the best of this condition."""
    more: int | None
    """Seeds that would tell it from the best, beyond those there are; None where that is not known."""
    possible: float
    """(score − local) / (oracle − local): its share of what was possible, where both of these ran."""
    costs: Mapping[str, float]
    """Means over its seeds of `COSTS`, NaN where not measured."""
    redrawn: Interval
    """The score again, with the bootstrap interval over its seeds."""
    clients: Interval
    """Mean score of the clients' own models in the last round; the bootstrap interval over seeds and clients."""

    @property
    def apart(self) -> bool:
        """Whether the best is told apart from it."""
        return self.holm < ALPHA


@dataclass(frozen=True)
class Condition:
    """What is the same for all its choices; the first standing has the best mean."""

    criterion: Score
    """The score that decides."""
    label: str
    """In words; empty where no condition varies."""
    values: Mapping[str, Any]
    standings: Sequence[Standing]
    controls: Sequence[Standing] = ()
    """Strategies that nobody can choose (`oracle`) or that do not aggregate (`local`): a scale, not candidates. Their
    regret is negative where they are better than the best candidate."""

    @property
    def best(self) -> Standing:
        """The first of those with most seeds, so that one lucky seed is no standard."""
        return next(each for each in self.standings if each.paired is None)

    @property
    def equals(self) -> list[Standing]:
        """Those that are not told apart from the best."""
        return [each for each in self.standings if each is not self.best and not each.apart]

    @property
    def alike(self) -> list[Standing]:
        """The best, and those that are not told apart from it."""
        return [self.best, *self.equals]


@dataclass(frozen=True)
class Overall:
    """A choice across the conditions in which it ran."""

    choice: str
    conditions: int
    """In how many it ran."""
    mean_place: float
    mean_regret: float
    worst_regret: float
    wins: int
    """Comparisons with another choice, condition by condition, in which it is better beyond chance."""
    ties: int
    losses: int


@dataclass(frozen=True)
class Decision:
    """The answer of a comparison."""

    conditions: Sequence[Condition]
    overall: Sequence[Overall]
    """Those that ran everywhere first, then by mean regret."""
    choices: Sequence[str]
    """The keys that were chosen among."""
    world: Sequence[str]
    """The keys that tell the conditions apart."""

    @property
    def criterion(self) -> Score:
        """The score that decides."""
        return self.conditions[0].criterion

    @property
    def labels(self) -> list[str]:
        """The conditions to choose from, in words; none where there is only one."""
        return [condition.label for condition in self.conditions] if len(self.conditions) > 1 else []

    @property
    def missing(self) -> list[str]:
        """Choices that did not run in every condition."""
        return [each.choice for each in self.overall if each.conditions < len(self.conditions)]


def decide(comparison: Comparison) -> Decision:
    """Compare the choices of a comparison within each of its conditions, and across them.

    Raises:
        FedloraError: there is no finished run to compare.
    """
    if comparison.runs.empty:
        first = next(iter(comparison.excluded), None)
        why = f"; first: {first.label}: {first.status}, {first.reason}" if first else ""
        raise FedloraError(f"{comparison.title}: no run has finished, so there is nothing to compare{why}")
    keys = frames.varied(comparison.runs)
    choices = [key for key in keys if comparison.roles.is_choice(key)]
    world = [key for key in keys if key not in choices]
    measured = _Tables.of(comparison)
    by_condition: dict[str, list[Setting]] = {}
    for setting in frames.settings(comparison.runs):
        by_condition.setdefault(_words(setting, world), []).append(setting)
    conditions = [_condition(label, found, (choices, world), measured) for label, found in by_condition.items()]
    return Decision(conditions, _across(conditions), choices, world)


def _words(setting: Setting, keys: Sequence[str]) -> str:
    return frames.words({key: setting.values[key] for key in keys})


def _condition(
    label: str, settings: Sequence[Setting], keys: tuple[Sequence[str], Sequence[str]], found: _Tables
) -> Condition:
    choices, world = keys
    every = sorted((_Scored.of(setting, found) for setting in settings), key=lambda each: -_or_lowest(each.merit))
    candidates = [each for each in every if not is_control(each.setting.strategy)] or every
    most = max(len(each.setting.seeds) for each in candidates)
    best = next(each for each in candidates if len(each.setting.seeds) == most)
    differences = [None if each is best else statistics.paired(each.by_seed, best.by_seed) for each in candidates]
    corrected = statistics.holm([each.p if each else math.nan for each in differences])
    tests = max(1, sum(not math.isnan(p) for p in corrected))
    places = scipy.stats.rankdata([-_or_lowest(each.merit) for each in candidates])
    ends = {each.setting.strategy: each.merit for each in reversed(every) if each.setting.strategy in ENDS}

    def standing(each: _Scored, place: float, paired: Paired | None, p: float) -> Standing:
        """The setting as it stands beside the best."""
        return Standing(
            choice=_words(each.setting, choices),
            setting=each.setting,
            results=each.results,
            score=each.score,
            by_seed=each.by_seed,
            place=float(place),
            regret=-found.criterion.sign * paired.difference.mean if paired else 0.0,
            paired=paired,
            holm=p,
            more=statistics.more_seeds(paired, tests) if paired else None,
            possible=_share(each.merit, ends),
            costs=each.costs,
            redrawn=each.redrawn,
            clients=each.clients,
        )

    standings = [standing(*each) for each in zip(candidates, places, differences, corrected, strict=True)]
    controls = [
        standing(each, math.nan, statistics.paired(each.by_seed, best.by_seed), math.nan)
        for each in every
        if each not in candidates
    ]
    values = {key: settings[0].values[key] for key in world}
    return Condition(found.criterion, label, values, standings, controls)


@dataclass(frozen=True)
class _Tables:
    """What was measured of runs, and what each result cannot leave."""

    criterion: Score
    results: pd.DataFrame
    costs: pd.DataFrame
    clients: Mapping[str, Sequence[float]]
    bounds: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, comparison: Comparison) -> _Tables:
        return cls(
            comparison.criterion,
            tables.results(comparison),
            tables.spent(comparison),
            tables.client_scores(comparison),
            tables.bounds(comparison),
        )


@dataclass(frozen=True)
class _Scored:
    """A setting with its score and costs."""

    setting: Setting
    results: Mapping[str, Interval]
    score: Interval
    merit: float
    """The mean score, turned so that the highest is the best."""
    by_seed: Mapping[Any, float]
    costs: Mapping[str, float]
    redrawn: Interval
    clients: Interval

    @classmethod
    def of(cls, setting: Setting, found: _Tables) -> _Scored:
        own = found.costs.loc[list(setting.seeds.values())]
        criterion = found.criterion
        scores = tables.of_runs(found.results, setting, criterion.name)
        results = {name: tables.over_seeds(found.results, setting, name, ends) for name, ends in found.bounds.items()}
        return cls(
            setting,
            results,
            results[criterion.name],
            criterion.sign * results[criterion.name].mean,
            dict(zip(setting.seeds, scores, strict=True)),
            {name: float(own[name].mean()) for name in COSTS},
            statistics.redrawn([[score] for score in scores]),
            statistics.redrawn([found.clients.get(run, []) for run in setting.seeds.values()]),
        )


def is_control(strategy: str) -> bool:
    """Whether a strategy is there to compare with, and not to be taken."""
    try:
        return registry.find(strategy).traits.family is Family.CONTROL
    except ConfigError:  # a plug-in that is not installed here
        return False


def _or_lowest(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _share(merit: float, ends: Mapping[str, float]) -> float:
    """(score − local) / (oracle − local); NaN unless both ran and the oracle is the better one."""
    low, high = (ends.get(name, math.nan) for name in ENDS)
    return (merit - low) / (high - low) if high > low else math.nan


def _across(conditions: Sequence[Condition]) -> list[Overall]:
    names = list(dict.fromkeys(each.choice for condition in conditions for each in condition.standings))
    met = [_met(condition) for condition in conditions]
    found = []
    for name in names:
        own = [each for condition in conditions for each in condition.standings if each.choice == name]
        regrets = [each.regret for each in own]
        results = [sign for pairs in met for (one, _), sign in pairs.items() if one == name]
        counts = [sum(1 for sign in results if sign == wanted) for wanted in (1, 0, -1)]
        mean_place = sum(each.place for each in own) / len(own)
        found.append(Overall(name, len(own), mean_place, sum(regrets) / len(own), max(regrets), *counts))
    return sorted(found, key=lambda each: (-each.conditions, each.mean_regret, each.mean_place))


def _met(condition: Condition) -> dict[tuple[str, str], int]:
    """For each pair of choices in a condition: 1 where the first is better beyond chance (all pairs tested at once,
    Holm), -1 where the second is, 0 where they are not told apart."""
    scores = {each.choice: each.by_seed for each in condition.standings}
    names = list(scores)
    pairs = [(one, other) for index, one in enumerate(names) for other in names[index + 1 :]]
    tests = [statistics.paired(scores[one], scores[other]) for one, other in pairs]
    signs: dict[tuple[str, str], int] = {}
    for (one, other), found, p in zip(pairs, tests, statistics.holm([each.p for each in tests]), strict=True):
        ahead = condition.criterion.sign * found.difference.mean > 0
        sign = 0 if math.isnan(p) or p >= ALPHA else (1 if ahead else -1)
        signs[one, other], signs[other, one] = sign, -sign
    return signs
