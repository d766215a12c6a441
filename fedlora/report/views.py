"""The tables of the page, in words: what a reader sees in each cell, and what it is sorted by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.errors import counted
from fedlora.report import frames, plots, tables
from fedlora.report.frames import Comparison, Setting
from fedlora.report.statistics import Interval
from fedlora.report.tables import Row

_NONE = "–"
ALPHA = 0.05
"""p-values below it are called a difference."""


@dataclass(frozen=True)
class Cell:
    """Text, the number it is sorted by (None: the text), and the colour of the dot before it."""

    text: str
    order: float | None = None
    colour: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page; the first column names the row."""

    titles: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def shown(value: float, digits: int = 3, sign: bool = False) -> Cell:
    """A number with so many decimals."""
    if math.isnan(value):
        return Cell(_NONE, -math.inf)
    return Cell(f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−"), value)


def spread(found: Interval, digits: int = 3) -> Cell:
    """A mean with its interval, where it has one."""
    cell = shown(found.mean, digits)
    if math.isnan(found.half):
        return cell
    return Cell(f"{cell.text} ± {found.half:.{digits}f}", cell.order)


def p_value(p: float) -> Cell:
    """A p-value."""
    if math.isnan(p):
        return Cell(_NONE, math.inf)
    return Cell("< 0.001" if p < 0.001 else f"{p:.3f}", p)


def name(setting: Setting) -> Cell:
    """A setting, with the dot of its strategy's colour."""
    return Cell(setting.label, None, plots.colour(setting.strategy))


def leaderboard(rows: Sequence[Row]) -> Table:
    """A row per setting: accuracy with its interval, the difference from the best, and the other results."""
    titles = ["setting", "seeds", "accuracy", "difference from best", "p (Holm)", "macro-F1", "gap", "ρ round 1"]
    titles += ["ρ last", "ρ floor", "clients used", "MB", "seconds"]
    body = []
    for row in rows:
        found = row.results
        difference, p = Cell("best", 0.0), Cell(_NONE, math.inf)
        if row.paired:
            difference, p = shown(row.paired.difference.mean, 3, sign=True), p_value(row.holm)
        cells = [name(row.setting), Cell(str(len(row.setting.seeds)), len(row.setting.seeds))]
        cells += [spread(found["accuracy"]), difference, p]
        cells += [shown(found[key].mean) for key in ("macro_f1", "gap", "rho_first", "rho_last", "rho_floor")]
        cells += [shown(found["clients_used"].mean, 1), shown(found["megabytes"].mean, 2)]
        cells.append(shown(found["seconds"].mean, 1))
        body.append(cells)
    return Table(titles, body)


def paired(rows: Sequence[Row]) -> Table:
    """Differences from the best, seed by seed: mean, interval, p-values."""
    titles = ("setting", "common seeds", "difference", "95 % interval", "p", "p (Holm)", "note")
    body = []
    for row in rows:
        if row.paired:
            found = row.paired.difference
            limits = _NONE if math.isnan(found.half) else f"{shown(found.low).text} to {shown(found.high).text}"
            numbers = [Cell(str(found.n), found.n), shown(found.mean, 4, sign=True), Cell(limits, found.low)]
            body.append([name(row.setting), *numbers, p_value(row.paired.p), p_value(row.holm), Cell(row.paired.why)])
    return Table(titles, body)


def verdict(rows: Sequence[Row]) -> str:
    """What can be said of the best, in a sentence or two."""
    if len(rows) == 1:
        return "One setting: there is nothing to compare it with."
    first = next(row for row in rows if row.paired is None)
    best = first.setting.label
    if len({row.results["accuracy"].mean for row in rows}) == 1:
        return "All settings have the same mean accuracy."
    tested = [row for row in rows if row.paired and not math.isnan(row.holm)]
    if not tested:
        most = max(len(row.setting.seeds) for row in rows)
        if most == 1:
            return (
                f"{best} has the highest accuracy. Each setting ran with one seed, so there is neither an interval nor "
                "a test: these runs do not say how large a difference seeds alone make; several seeds of each would."
            )
        return f"{best} has the highest mean accuracy; no difference from it could be tested (see the notes below)."
    worse = [row for row in tested if row.holm < ALPHA]
    said = f"{best} has the highest mean accuracy. "
    if not worse:
        alone = len(tested) == 1
        none = (
            "The only other tested setting does not differ"
            if alone
            else f"None of the {len(tested)} tested settings differs"
        )
        return f"{said}{none} from it beyond chance (p < {ALPHA} after Holm)."
    close = [row.setting.label for row in rows if row.paired and row not in worse]
    rest = f" Not separated from it: {_listed(close)}." if close else ""
    verb = "differs" if len(worse) == 1 else "differ"
    return (
        f"{said}{len(worse)} of {counted(len(tested), 'tested setting')} {verb} from it (p < {ALPHA} after Holm).{rest}"
    )


def _listed(labels: Sequence[str], most: int = 12) -> str:
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more


def correlations(comparison: Comparison) -> Table:
    """ρ against accuracy: coefficients, number of points, p-values."""
    titles = ("ρ", "points", "n", "Pearson r", "p", "Spearman r", "p", "note")
    body = []
    for entry in tables.correlations(comparison):
        found = entry.found
        few = "" if found.why or found.n >= 10 else "few points: uncertain"
        linear = [shown(found.pearson, 2, sign=True), p_value(found.pearson_p)]
        ranked = [shown(found.spearman, 2, sign=True), p_value(found.spearman_p)]
        counted = [Cell(entry.rho), Cell(entry.points), Cell(str(found.n), found.n)]
        body.append([*counted, *linear, *ranked, Cell(found.why or few)])
    return Table(titles, body)


def costs(comparison: Comparison) -> Table:
    """Megabytes by kind and seconds by phase, sums over a run's rounds, means over seeds."""
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
    body = []
    for setting, sums in tables.costs(comparison):
        sent = [sums[key] / 1e6 for key in ("up_adapter", "up_head", "down_adapter", "down_head", "down_base")]
        spent = [shown(sums[key], 2 if key in ("read", "aggregate", "divergence") else 1) for key in phases]
        row = [*(shown(value, 2) for value in (*sent, sum(sent))), *spent]
        body.append([name(setting), *row])
    return Table(titles, body)


def excluded(comparison: Comparison) -> Table:
    """Runs and cells that take no part, and why."""
    rows = [[Cell(entry.label), Cell(entry.status), Cell(entry.reason or _NONE)] for entry in comparison.excluded]
    return Table(("run", "status", "reason"), rows)


def differences(comparison: Comparison) -> Table:
    """What tells the runs apart: their varied settings, seed, partition and MLflow run id."""
    keys = frames.varied(comparison.runs)
    body = [
        [
            Cell(str(row["name"])),
            *(_value(row[key]) for key in keys),
            _value(row["seed"]),
            Cell(str(row["partition"] or _NONE)),
            Cell(str(row["run_id"])),
        ]
        for row in comparison.runs.to_dict("records")
    ]
    return Table(("run", *keys, "seed", "partition hash", "MLflow run"), body)


def _value(value: Any) -> Cell:
    if frames.is_missing(value):
        return Cell(_NONE, -math.inf)
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
    return _NONE if value is None or value == {} else str(value)


def facts(comparison: Comparison) -> list[tuple[str, str]]:
    """What was compared, at a glance: what varies, and the settings that matter most."""
    runs = comparison.runs
    found = [("runs", f"{len(runs)} finished, {counted(len(frames.settings(runs)), 'setting')}")]
    for key in frames.varied(runs):
        values = list(dict.fromkeys(_value(value).text for value in runs[key]))
        found.append((key, f"{_listed(values, 30)}" + (" (varied)" if len(values) > 1 else "")))
    seeds = sorted(dict.fromkeys(runs["seed"]), key=str)
    found.append(("seed", ", ".join(frames.plain(seed) for seed in seeds)))
    for key in ("model.name", "data.name", "partition.name", "clients", "rounds", "lora.rank"):
        if key in runs and key not in dict(found):
            found.append((key, _value(runs[key].iloc[0]).text))
    return found
