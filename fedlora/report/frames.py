"""What a report is made of, and what tells its runs apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from fedlora import metrics, objective
from fedlora.config.run import NEUTRAL, RunConfig
from fedlora.objective import Score
from fedlora.report.roles import Roles

RUN_COLUMNS = ("run_id", "name", "status", "sweep", "strategy", "seed", "partition", "digest", "started")
"""The columns of `Comparison.runs` that are neither settings nor results."""

_NEUTRAL = ("seed", "strategy", *NEUTRAL)
"""Settings that decide nothing of a run's numbers, or stand apart."""
_OF_PARTITION = ("clients", "data.", "partition.")


@dataclass(frozen=True)
class Excluded:
    """A run or cell that takes no part: its label, how it ended, and why it is left out."""

    label: str
    status: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Runs to compare, as tables. Only finished runs belong in it; the others are named in `excluded`.

    `runs`: a row per run with `RUN_COLUMNS`, settings under their dotted names, results as `final/…`.
    `rounds`: `run_id`, `round`, then a column per metric (`global/accuracy`, …).
    `modules`: `run_id`, `round`, `module`, `rho`, `floor`, …  `clients`: `run_id`, `round`, `client`, `examples`, …
    """

    title: str
    note: str
    runs: pd.DataFrame
    rounds: pd.DataFrame
    modules: pd.DataFrame = field(default_factory=pd.DataFrame)
    clients: pd.DataFrame = field(default_factory=pd.DataFrame)
    answers: pd.DataFrame = field(default_factory=pd.DataFrame)
    """`run_id`, `round`, `row` of the test set, `prompt`, `answer`, `reference`, and a column per scorer."""
    partitions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By hash: `labels`, `label_counts` (clients × labels), `sizes`, …"""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By run id: the whole configuration, dotted key to value."""
    excluded: Sequence[Excluded] = ()
    roles: Roles = field(default_factory=Roles)
    """Which of the settings that vary are choices; the others are conditions."""
    scores: Sequence[Score] = field(default_factory=lambda: objective.scores_of(RunConfig()))
    """What all its runs are judged by: the score that decides, then others."""
    labelled: bool = True
    """Whether labels are what is learned."""

    @property
    def criterion(self) -> Score:
        """The score that decides."""
        return self.scores[0]


@dataclass(frozen=True)
class Setting:
    """What is compared: everything that varies but the seed. One or more runs, a seed each."""

    label: str
    strategy: str
    values: Mapping[str, Any]
    """Dotted key to value, for the keys that vary."""
    seeds: dict[Any, str]
    """Seed to run id."""


def only_compared(modules: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """The rows of modules without ρ, floor and excess in rounds that used one client's update: as `RoundRecord`."""
    if modules.empty or metrics.CLIENTS_COMPLETED not in rounds:
        return modules
    alone = rounds.loc[rounds[metrics.CLIENTS_COMPLETED] == 1, ["run_id", "round"]]
    keys = pd.MultiIndex.from_frame(modules[["run_id", "round"]])
    blank = [name for name in ("rho", "floor", "excess") if name in modules]
    found = modules.copy()
    found.loc[keys.isin(pd.MultiIndex.from_frame(alone)), blank] = math.nan
    return found


def is_missing(value: Any) -> bool:
    """Whether a table holds no value there."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA


def words(values: Mapping[str, Any]) -> str:
    """`svd lora.rank=4`: the strategy by its name, other settings as key=value, what is not set left out."""
    shown = ((key, value) for key, value in values.items() if not is_missing(value))
    return " ".join(plain(value) if key == "strategy" else f"{key}={plain(value)}" for key, value in shown)


def plain(value: Any) -> str:
    """A value as a person would type it: 4 rather than 4.0."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def settings_columns(runs: pd.DataFrame) -> list[str]:
    """The columns of a table of runs that hold settings (dotted keys of the configuration)."""
    return [
        str(column)
        for column in runs.columns
        if column not in RUN_COLUMNS and not str(column).startswith(metrics.FINAL)
    ]


def varied(runs: pd.DataFrame) -> list[str]:
    """The settings that differ between runs, the strategy first; seed, tracking and placement left out."""
    keys = [key for key in settings_columns(runs) if key not in _NEUTRAL and not key.startswith("tracking.")]
    return ["strategy", *(key for key in sorted(keys) if runs[key].map(comparable).nunique() > 1)]


def comparable(value: Any) -> str:
    """A value by which runs are told apart; empty where there is none."""
    return "" if is_missing(value) else plain(value)


def settings(runs: pd.DataFrame, keys: Sequence[str] = ()) -> list[Setting]:
    """The settings of a table of runs, in the order in which they first appear.

    Args:
        runs: a row per run.
        keys: what tells settings apart, the strategy among it. None: what varies.
    """
    keys = keys or varied(runs)
    found: dict[tuple[str, ...], Setting] = {}
    for row in runs.to_dict("records"):
        values = {key: row.get(key) for key in keys}
        new = Setting(words(values), str(values["strategy"]), values, {})
        found.setdefault(identity(new), new).seeds[row["seed"]] = str(row["run_id"])
    return list(found.values())


def identity(setting: Setting) -> tuple[str, ...]:
    """What a setting is known by among those with the same keys."""
    return tuple(comparable(value) for value in setting.values.values())


def partition_keys(keys: Sequence[str]) -> list[str]:
    """Those settings on which the partition depends by its nature: number of clients, data, partitioner."""
    return [key for key in keys if key.startswith(_OF_PARTITION)]
