"""What changed between two comparisons: two nights of a sweep, or the same choices before and after a change.

A cell is a choice under a condition. Cells that both have are compared: seed by seed where they ran the same seeds on
the same partitions (paired t-test, which leaves out what seeds and data do), by Welch's test of two means otherwise.
All cells are tested at once (Holm), so that where nothing changed a change is called in one case of twenty at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedlora.errors import FedloraError
from fedlora.objective import Score
from fedlora.report import frames, statistics, tables
from fedlora.report.costs import COSTS
from fedlora.report.decision import ALPHA
from fedlora.report.frames import Comparison, Setting
from fedlora.report.statistics import Interval, Paired

PAIRED, WELCH = "paired", "Welch"
_CERTAIN = "megabytes"
"""A cost in which there is no chance: any difference beyond rounding is one."""
_ROUNDING = 1e-9
_UNTOLD = ("name", "strategy")
"""Settings that are no difference between two comparisons."""


@dataclass(frozen=True)
class Change:
    """A result of a cell before and after."""

    before: Interval
    after: Interval
    found: Paired
    """After minus before."""
    test: str
    """`PAIRED` or `WELCH`."""
    holm: float
    """The p-value corrected for all cells; NaN where nothing could be tested."""

    @property
    def difference(self) -> float:
        """After minus before: in the seeds of both, or of the means."""
        return self.found.difference.mean

    @property
    def beyond(self) -> bool:
        """Whether it is more than chance."""
        return self.holm < ALPHA


@dataclass(frozen=True)
class Cell:
    """A choice under a condition that both comparisons have."""

    condition: str
    choice: str
    strategy: str
    rest: str
    """The choice besides its strategy."""
    score: Change
    costs: Mapping[str, Change]
    """By `COSTS`, those that both measured."""

    @property
    def label(self) -> str:
        """The choice and where."""
        return f"{self.choice} at {self.condition}" if self.condition else self.choice

    @property
    def dearer_or_cheaper(self) -> list[str]:
        """The costs that differ: bytes at all, seconds beyond chance."""
        return [
            name
            for name, cost in self.costs.items()
            if cost.beyond or (name == _CERTAIN and abs(cost.difference) > _ROUNDING * max(1.0, abs(cost.before.mean)))
        ]

    @property
    def fell(self) -> bool:
        """Whether its score is lower beyond chance."""
        return self.score.beyond and self.score.difference < 0

    @property
    def rose(self) -> bool:
        """Whether it is higher beyond chance."""
        return self.score.beyond and self.score.difference > 0


@dataclass(frozen=True)
class Differing:
    """A setting that is not the same in both, with its values in words."""

    key: str
    before: str
    after: str


@dataclass(frozen=True)
class Changes:
    """Two comparisons side by side."""

    criterion: Score
    """The score that decides."""
    before: str
    """What it is called."""
    after: str
    cells: Sequence[Cell]
    settings: Sequence[Differing]
    """What is the same for all runs of each, and not the same in both."""
    only_before: Sequence[str]
    """Cells that the other does not have."""
    only_after: Sequence[str]
    dealt: Sequence[str]
    """Seeds in which a cell had another partition: the data, or how it was dealt, changed."""

    @property
    def conditions(self) -> list[str]:
        """The conditions of the cells, in words; none where there is only one."""
        found = list(dict.fromkeys(cell.condition for cell in self.cells))
        return found if len(found) > 1 else []

    @property
    def worse(self) -> list[Cell]:
        """The regression: cells whose score is worse beyond chance."""
        return [cell for cell in self.cells if (cell.fell if self.criterion.higher_is_better else cell.rose)]

    @property
    def better(self) -> list[Cell]:
        """Cells whose score is better beyond chance."""
        return [cell for cell in self.cells if (cell.rose if self.criterion.higher_is_better else cell.fell)]

    @property
    def tests(self) -> int:
        """How many scores could be tested, which is what Holm corrects for."""
        return sum(not math.isnan(cell.score.holm) for cell in self.cells)


def compare(before: Comparison, after: Comparison) -> Changes:
    """Compare the cells that two comparisons have in common.

    What is a choice and what a condition is as `after` says.

    Raises:
        FedloraError: one has no finished run, they are judged by different scores, or have no cell in common.
    """
    for each in (before, after):
        if each.runs.empty:
            raise FedloraError(f"{each.title}: no run has finished, so there is nothing to compare")
    criterion = after.criterion
    if before.criterion != criterion:
        raise FedloraError(
            f"{before.title} is judged by its {before.criterion.title}, {after.title} by its {criterion.title}: there "
            "is nothing to compare"
        )
    both = {*frames.varied(before.runs), *frames.varied(after.runs)}
    keys = ["strategy", *sorted(both - {"strategy"})]
    old, new = _Side.of(before, keys), _Side.of(after, keys)
    common = [identity for identity in new.settings if identity in old.settings]
    if not common:
        raise FedloraError(
            f"{before.title} and {after.title} have no choice under the same condition in common (the first: "
            f"{_first(old)}, and {_first(new)}), so there is nothing to compare"
        )
    ends = tables.bounds(after)
    found = {
        name: _tested([_one(old, new, identity, name, ends.get(name, tables.UNBOUNDED)) for identity in common])
        for name in (criterion.name, *COSTS)
    }
    roles = [[key for key in keys if after.roles.is_choice(key) is chosen] for chosen in (True, False)]
    cells = [
        _cell(new.settings[identity], roles, found[criterion.name][place], {key: found[key][place] for key in COSTS})
        for place, identity in enumerate(common)
    ]
    order = list(dict.fromkeys(cell.condition for cell in cells))
    cells = sorted(cells, key=lambda cell: order.index(cell.condition))
    return Changes(
        criterion,
        before.title,
        after.title,
        cells,
        _differing(before.runs, after.runs, keys),
        [setting.label for identity, setting in old.settings.items() if identity not in new.settings],
        [setting.label for identity, setting in new.settings.items() if identity not in old.settings],
        _dealt(old, new, common),
    )


Identity = tuple[str, ...]


@dataclass(frozen=True)
class _Side:
    """One of the two: its settings by what they are, its results, and the partition of each run."""

    settings: Mapping[Identity, Setting]
    results: pd.DataFrame
    partitions: Mapping[str, str]

    @classmethod
    def of(cls, comparison: Comparison, keys: Sequence[str]) -> _Side:
        found = {frames.identity(each): each for each in frames.settings(comparison.runs, keys)}
        results = tables.results(comparison)[[comparison.criterion.name]].join(tables.spent(comparison))
        partitions = dict(
            zip(comparison.runs["run_id"], comparison.runs["partition"].map(frames.comparable), strict=True)
        )
        return cls(found, results, partitions)

    def values(self, identity: Identity, result: str) -> dict[Any, float]:
        """A result by seed."""
        setting = self.settings[identity]
        return dict(zip(setting.seeds, tables.of_runs(self.results, setting, result), strict=True))

    def dealt(self, identity: Identity) -> dict[Any, str]:
        """The partition by seed."""
        return {seed: self.partitions[run] for seed, run in self.settings[identity].seeds.items()}


def _one(
    old: _Side, new: _Side, identity: Identity, result: str, bounds: tuple[float, float]
) -> tuple[Interval, Interval, Paired, str]:
    before, after = old.values(identity, result), new.values(identity, result)
    ends = [statistics.interval(list(each.values()), bounds=bounds) for each in (before, after)]
    if _alike(old.dealt(identity), new.dealt(identity)):
        return *ends, statistics.paired(after, before), PAIRED  # type: ignore[return-value]
    return *ends, statistics.welch(list(after.values()), list(before.values())), WELCH  # type: ignore[return-value]


def _alike(before: Mapping[Any, str], after: Mapping[Any, str]) -> bool:
    """Whether one ran no seed that the other did not, each on the same partition: then they are pairs."""
    common = before.keys() & after.keys()
    same = all(before[seed] == after[seed] for seed in common)
    return bool(common) and len(common) == min(len(before), len(after)) and same


def _tested(found: Sequence[tuple[Interval, Interval, Paired, str]]) -> list[Change]:
    corrected = statistics.holm([test.p for _, _, test, _ in found])
    return [Change(*each, holm) for each, holm in zip(found, corrected, strict=True)]


def _cell(setting: Setting, roles: Sequence[Sequence[str]], score: Change, costs: Mapping[str, Change]) -> Cell:
    choice, condition = (frames.words({key: setting.values[key] for key in keys}) for keys in roles)
    rest = frames.words({key: setting.values[key] for key in roles[0] if key != "strategy"})
    known = {name: cost for name, cost in costs.items() if not math.isnan(cost.difference)}
    return Cell(condition, choice, setting.strategy, rest, score, known)


def _differing(before: pd.DataFrame, after: pd.DataFrame, varied: Sequence[str]) -> list[Differing]:
    """The settings that the runs of one have and those of the other have not, and the seeds."""
    keys = dict.fromkeys([*frames.settings_columns(before), *frames.settings_columns(after), "seed"])
    found = []
    for key in keys:
        if key not in (*varied, *_UNTOLD) and not key.startswith("tracking."):
            one, other = (_values(runs, key) for runs in (before, after))
            if one != other:
                found.append(Differing(key, one, other))
    return found


def _values(runs: pd.DataFrame, key: str) -> str:
    known = {frames.comparable(value) for value in runs[key]} if key in runs else set()
    return ", ".join(sorted(known - {""}, key=lambda value: (len(value), value)))


def _dealt(old: _Side, new: _Side, common: Sequence[Identity]) -> list[str]:
    pairs = [(old.dealt(identity), new.dealt(identity)) for identity in common]
    seeds = {frames.plain(s) for one, other in pairs for s in one if s in other and one[s] != other[s]}
    return sorted(seeds, key=lambda seed: (len(seed), seed))


def _first(side: _Side) -> str:
    return next(iter(side.settings.values())).label
