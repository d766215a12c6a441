"""The tables of the page, in words: what a reader sees in each cell, and what it is sorted by."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedlora.errors import counted
from fedlora.report import frames, plots, tables
from fedlora.report.decision import Decision
from fedlora.report.frames import Comparison, Setting
from fedlora.report.statistics import Interval

NONE = "–"
"""What stands where there is no value."""
_JOINED = "\u00a0"
"""A space at which no line ends: an interval stays whole."""


_FIXED = ("model.name", "data.name", "partition.name", "clients", "rounds", "lora.rank")
"""Settings that say most of what was compared."""


@dataclass(frozen=True)
class Cell:
    """Text, the number it is sorted by (None: the text), the colour of the dot before it, and whether it is bold."""

    text: str
    order: float | None = None
    colour: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page; the first column names the row, and is always there. Readers hide and show the others."""

    titles: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    kind: str = ""
    """What readers hide and show columns of: tables of a kind do so together. Empty: a table without a choice."""
    hidden: Collection[str] = ()
    """Titles of columns that are hidden until asked for."""
    narrow: Collection[str] = ()
    """Titles of the columns that a phone shows; the others are hidden there until asked for. Empty: all."""

    conditions: Sequence[int] = ()
    """Of each row the condition with which it is shown; empty: with all."""

    def look(self, column: int) -> str:
        """How a column is shown before anybody asks: `off` not at all, `roomy` where there is room for it."""
        title = self.titles[column]
        if title in self.hidden:
            return "off"
        return "roomy" if self.narrow and column and title not in self.narrow else ""

    @property
    def shown(self) -> Table:
        """Without the columns that are hidden until asked for: where nobody can ask."""
        kept = [column for column, title in enumerate(self.titles) if title not in self.hidden]
        return Table([self.titles[i] for i in kept], [[row[i] for i in kept] for row in self.rows])


def shown(value: float, digits: int = 3, sign: bool = False) -> Cell:
    """A number with so many decimals."""
    if math.isnan(value):
        return Cell(NONE, -math.inf)
    return Cell(f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−"), value)


def spread(found: Interval, digits: int = 3) -> Cell:
    """A mean with its interval; of two values both, for an interval of two says nothing."""
    cell = shown(found.mean, digits)
    if found.known:
        return Cell(f"{cell.text} ({found.low:.{digits}f}{_JOINED}to{_JOINED}{found.high:.{digits}f})", cell.order)
    if found.n == 2:
        return Cell(f"{cell.text} ({found.values[0]:.{digits}f},{_JOINED}{found.values[1]:.{digits}f})", cell.order)
    return cell


def p_value(p: float) -> Cell:
    """A p-value."""
    if math.isnan(p):
        return Cell(NONE, math.inf)
    return Cell("< 0.001" if p < 0.001 else f"{p:.3f}", p)


def name(setting: Setting, words: str = "", strong: bool = False) -> Cell:
    """A setting, or what it is called here, with the dot of its strategy's colour."""
    return Cell(words or setting.label, None, plots.colour(setting.strategy), strong)


def _listed(labels: Sequence[str], most: int = 12) -> str:
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more


def correlations(comparison: Comparison) -> Table:
    """ρ against the score: coefficients, number of points, p-values."""
    titles = ("ρ", "points", "n", "Pearson r", "p (Pearson)", "Spearman r", "p (Spearman)", "note")
    body = []
    for entry in tables.correlations(comparison):
        found = entry.found
        few = "" if found.why or found.n >= 10 else "few points: uncertain"
        linear = [shown(found.pearson, 2, sign=True), p_value(found.pearson_p)]
        ranked = [shown(found.spearman, 2, sign=True), p_value(found.spearman_p)]
        counted = [Cell(entry.rho), Cell(entry.points), Cell(str(found.n), found.n)]
        body.append([*counted, *linear, *ranked, Cell(found.why or few)])
    return Table(titles, body, "correlations", narrow=("n", "Pearson r", "Spearman r"))


def costs(comparison: Comparison, decided: Decision) -> Table:
    """Megabytes by kind and seconds by phase, sums over a run's rounds, means over seeds; condition by condition."""
    kinds = [
        "up: adapter (MB)",
        "up: head (MB)",
        "down: adapter (MB)",
        "down: head (MB)",
        "down: base (MB)",
        "all (MB)",
    ]
    phases = ["train", "read", "aggregate", "divergence", "evaluate", "round"]
    titles = ["setting", *kinds, *(f"{phase} (s)" for phase in phases[:-1]), "rounds, all (s)"]
    standings = [(*one.standings, *one.controls) for one in decided.conditions]
    panels = {each.setting.label: panel for panel, every in enumerate(standings) for each in every}
    body, conditions = [], []
    for setting, sums in sorted(tables.costs(comparison), key=lambda entry: panels[entry[0].label]):
        sent = [sums[key] / 1e6 for key in ("up_adapter", "up_head", "down_adapter", "down_head", "down_base")]
        spent = [shown(sums[key], 2 if key in ("read", "aggregate", "divergence") else 1) for key in phases]
        row = [*(shown(value, 2) for value in (*sent, sum(sent))), *spent]
        body.append([name(setting), *row])
        conditions.append(panels[setting.label])
    return Table(titles, body, "costs", narrow=("all (MB)", "rounds, all (s)"), conditions=conditions)


def excluded(comparison: Comparison) -> Table:
    """Runs and cells that take no part, and why."""
    rows = [[Cell(entry.label), Cell(entry.status), Cell(entry.reason or NONE)] for entry in comparison.excluded]
    return Table(("run", "status", "reason"), rows, "excluded", narrow=("reason",))


def differences(comparison: Comparison) -> Table:
    """What tells the runs apart: their varied settings, seed, partition and MLflow run id."""
    keys = frames.varied(comparison.runs)
    body = [
        [
            Cell(str(row["name"])),
            *(_value(row[key]) for key in keys),
            _value(row["seed"]),
            Cell(str(row["partition"] or NONE)),
            Cell(str(row["run_id"])),
        ]
        for row in comparison.runs.to_dict("records")
    ]
    titles = ("run", *keys, "seed", "partition hash", "MLflow run")
    return Table(titles, body, "differences", narrow=("partition hash", "MLflow run"))


def _value(value: Any) -> Cell:
    if frames.is_missing(value):
        return Cell(NONE, -math.inf)
    order = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    return Cell(frames.plain(value), order)


@dataclass(frozen=True)
class Configs:
    """The configurations of all runs: what they share, and per run the rest."""

    shared: Mapping[str, str]
    own: Sequence[tuple[str, Mapping[str, str]]]


def configs(comparison: Comparison) -> Configs:
    """Split the configurations into what is equal everywhere and each run's own."""
    known = {run: content for run, content in comparison.configs.items() if content}
    keys = list(dict.fromkeys(key for content in known.values() for key in content))
    texts = {run: {key: _text(content.get(key)) for key in keys} for run, content in known.items()}
    shared = {key for key in keys if len({content[key] for content in texts.values()}) == 1}
    labels = {str(row["run_id"]): f"{row['name']} ({row['run_id']})" for row in comparison.runs.to_dict("records")}
    first = next(iter(texts.values()), {})
    return Configs(
        {key: first[key] for key in keys if key in shared},
        [
            (labels[run], {key: text for key, text in content.items() if key not in shared})
            for run, content in texts.items()
            if run in labels
        ],
    )


def _text(value: Any) -> str:
    return NONE if value is None or value == {} else str(value)


def subtitle(comparison: Comparison, decided: Decision) -> str:
    """What was compared, in two sentences: which choices under which conditions, and on what."""
    runs = comparison.runs
    choices, controls = (
        list(dict.fromkeys(each.choice for one in decided.conditions for each in getattr(one, group)))
        for group in ("standings", "controls")
    )
    said = f"{counted(len(choices), 'choice')} ({_listed(choices, 6)})"
    said += f" beside {' and '.join(controls)} as controls" if controls else ""
    if decided.labels:
        values = "; ".join(f"{key} {_listed(_texts(runs, key), 6)}" for key in decided.world)
        said += f", under {counted(len(decided.labels), 'condition')} ({values})"
    said += f": {counted(len(runs), 'run')}, {counted(runs['seed'].nunique(), 'seed')}."
    fixed = {key: _texts(runs, key)[0] for key in _FIXED if key in runs and len(_texts(runs, key)) == 1}
    sized = {"clients": "{} clients", "rounds": "{} rounds", "lora.rank": "rank {}"}
    what = [" on ".join(fixed[key] for key in ("model.name", "data.name") if key in fixed)]
    what += [words.format(fixed[key]) for key, words in sized.items() if key in fixed]
    return " ".join(filter(None, (said, ", ".join(filter(None, what)) + "."))) if any(what) else said


def _texts(runs: pd.DataFrame, key: str) -> list[str]:
    """The values of a setting, in words."""
    return list(dict.fromkeys(_value(value).text for value in runs[key]))


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What was compared, at a glance: what varies, and the settings that matter most."""
    runs = comparison.runs
    found = [("runs", f"{len(runs)} finished, {counted(len(frames.settings(runs)), 'setting')}")]
    for key in frames.varied(runs):
        values = _texts(runs, key)
        found.append((key, f"{_listed(values, 30)}" + (" (varied)" if len(values) > 1 else "")))
    seeds = sorted(dict.fromkeys(runs["seed"]), key=str)
    found.append(("seed", ", ".join(frames.plain(seed) for seed in seeds)))
    for key in _FIXED:
        if key in runs and key not in dict(found):
            found.append((key, _value(runs[key].iloc[0]).text))
    return found
