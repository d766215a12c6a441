"""Figures with rounds, megabytes or a setting along the x axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from fedlora import metrics
from fedlora.report import frames, marks, statistics, tables, wording
from fedlora.report.decision import Decision
from fedlora.report.frames import Comparison
from fedlora.report.marks import Figure, Look, Placed, Trace

_MOST_THIN_LINES = 30
"""Of more runs only the means are drawn: thin lines would hide them."""
_MOST_MARKERS = 15
"""Of more rounds only the line is drawn."""
_NOTHING = 1e-12
"""Share of the largest value below which a squared norm is rounding: where nothing jumps, nothing is drawn."""
_ROUND = "round"
_RHO = "ρ (relative error, no unit)"


def all_curves(comparison: Comparison, decided: Decision) -> list[Figure]:
    """Everything against rounds and megabytes that was measured."""
    by, title = comparison.criterion, f"{wording.title(comparison.criterion)} against rounds"
    score = (f"{by.name}-rounds", title, f"{metrics.GLOBAL}{by.name}", wording.axis(by, "test"), _SCORE)
    gap = ("gap", "Local–global gap", f"{metrics.GAP}{by.name}", wording.axis(by, "local − global"), _gap(comparison))
    found = [
        _of_metric(comparison, decided, *score),
        _score_megabytes(comparison, decided),
        _rho(comparison, decided),
        _of_metric(comparison, decided, *gap),
    ]
    found += [_of_metric(comparison, decided, *words, log=True) for words in _CONDITIONS]
    return [figure for figure in found if figure is not None]


_SCORE = "The broadcast model on the whole test set, after each round; round 0 is before training."


def _gap(comparison: Comparison) -> str:
    """How to read the gap."""
    score, side = comparison.criterion.title, wording.above(comparison.criterion)
    why = (
        f"With label skew it is {side} zero by nature: a client that holds three labels needs to know three."
        if comparison.labelled
        else f"Where clients' examples differ it is {side} zero by nature: each has trained on such as its own."
    )
    return (
        f"Mean {score} of the clients' own models on their own test examples, minus the broadcast model's on all. {why}"
    )


_CONDITIONS = [
    (
        f"condition-{letter}",
        f"{letter}: how far {what} jump at the broadcast",
        metric,
        f"{letter} (squared norm, log scale)",
        why,
    )
    for letter, metric, what, why in (
        ("R", metrics.ABO_R, "products B·A", "The observable side of the weak condition of arXiv 2508.01348."),
        ("P", metrics.ABO_P, "factors B", "With Q the observable side of the strong condition of arXiv 2508.01348."),
        ("Q", metrics.ABO_Q, "factors A", "With P the observable side of the strong condition of arXiv 2508.01348."),
    )
]


def _of_metric(
    comparison: Comparison,
    decided: Decision,
    key: str,
    title: str,
    metric: str,
    unit: str,
    caption: str,
    log: bool = False,
) -> Figure | None:
    points = _points(comparison, metric)
    if log:
        points = points[points[metric] > _NOTHING * points[metric].max()]
    if points.empty:
        return None
    traces: list[Trace] = []
    for look in marks.looks(decided):
        traces += _lines(look, points, _ROUND, metric, len(comparison.runs))
    y = marks.axis(unit, type="log", minorloglabels="complete") if log else marks.axis(unit)
    return Figure(key, title, caption, traces, marks.layout(_rounds_axis(points), y), panels=decided.labels)


def _score_megabytes(comparison: Comparison, decided: Decision) -> Figure | None:
    if metrics.BYTES_TOTAL not in comparison.rounds:
        return None
    criterion = comparison.criterion
    metric = f"{metrics.GLOBAL}{criterion.name}"
    points = _points(comparison, metric, metrics.BYTES_TOTAL)
    if points.empty:
        return None
    points = points.assign(megabytes=points[metrics.BYTES_TOTAL] / 1e6)
    traces: list[Trace] = []
    for look in marks.looks(decided):
        traces += _lines(look, points, "megabytes", metric, len(comparison.runs))
    caption = (
        f"The same {criterion.title} against everything sent so far by all clients, up and down (1 MB is 10⁶ bytes): "
        "adapters, heads and base updates. What sends nothing stands at zero."
    )
    axes = marks.layout(marks.axis("sent so far (MB)", rangemode="tozero"), marks.axis(wording.axis(criterion, "test")))
    title = f"{wording.title(criterion)} against megabytes"
    return Figure(f"{criterion.name}-megabytes", title, caption, traces, axes, panels=decided.labels, free=True)


def _rho(comparison: Comparison, decided: Decision) -> Figure | None:
    points = _points(comparison, metrics.RHO_MODEL)
    if points.empty:
        return None
    traces: list[Trace] = []
    for look in marks.looks(decided):
        traces += _lines(look, points, _ROUND, metrics.RHO_MODEL, len(comparison.runs))
        if metrics.RHO_FLOOR in points:
            traces.append(_floor(look, points))
    caption = (
        "ρ is the relative error of what was broadcast against the mean of the clients' products; thin and dotted the "
        "floor, the least error that the rank allows. From round two on strategies aggregate different uploads: only "
        "round one compares them on equal ones."
    )
    axes = marks.layout(_rounds_axis(points), marks.axis(_RHO, rangemode="tozero"), updatemenus=marks.linear_or_log())
    return Figure("rho-rounds", "ρ and its floor against rounds", caption, traces, axes, panels=decided.labels)


def _floor(look: Placed, points: pd.DataFrame) -> Trace:
    mean = _mean(look, points, metrics.RHO_FLOOR)
    return look.line(
        of=f"floor, {look.seeds}",
        x=marks.numbers(mean[_ROUND]),
        y=marks.numbers(mean[metrics.RHO_FLOOR]),
        mode="lines",
        line={"color": look.colour, "dash": "dot", "width": 1.2},
        showlegend=False,
        hovertemplate=f"{look.words}<br>floor in round %{{x}}: %{{y}}<extra></extra>",
    )


def _points(comparison: Comparison, *needed: str) -> pd.DataFrame:
    """The rounds in which all of `needed` were measured; empty where never."""
    if not set(needed) <= set(comparison.rounds.columns):
        return pd.DataFrame()
    return comparison.rounds.dropna(subset=list(needed)).sort_values(_ROUND)


def _mean(look: Placed, points: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Means over a setting's seeds, round by round."""
    own = points[points["run_id"].isin(look.runs)]
    return own.groupby(_ROUND, as_index=False)[list(columns)].mean()


def _lines(look: Placed, points: pd.DataFrame, x: str, y: str, runs: int) -> list[Trace]:
    """The mean over seeds as a line, and each seed as a thin one where these are few enough to be told apart."""
    mean = _mean(look, points, *({x, y} - {_ROUND}))
    if mean.empty:
        return []
    found = [_drawn(look, mean, x, y, look.seeds)]
    if len(look.runs) > 1 and runs <= _MOST_THIN_LINES:
        found += [
            _drawn(look, points[points["run_id"] == run], x, y, f"seed {frames.plain(seed)}")
            | {"mode": "lines", "opacity": 0.3, "showlegend": False, "line": {"color": look.colour, "width": 1}}
            for seed, run in look.standing.setting.seeds.items()
        ]
    return found


def _drawn(look: Placed, points: pd.DataFrame, x: str, y: str, of: str) -> Trace:
    """A line.

    Args:
        look: of what.
        points: rows.
        x: the column along the x axis.
        y: the other.
        of: the seed, or what it is a mean of.
    """
    marked = len(points) <= _MOST_MARKERS
    where = "%{customdata}" if x != _ROUND else "%{x}"
    return look.line(
        of=of,
        each="round" if x != _ROUND else "",
        x=marks.numbers(points[x]),
        y=marks.numbers(points[y]),
        mode="lines+markers" if marked else "lines",
        customdata=[int(number) for number in points[_ROUND]],
        hovertemplate=f"{look.words}, {marks.safe(of)}<br>round {where}: %{{y:.4g}}"
        + (", %{x:.4g} MB" if x != _ROUND else "")
        + "<extra></extra>",
    )


def _rounds_axis(points: pd.DataFrame) -> dict[str, Any]:
    few = points[_ROUND].max() <= 12
    return marks.axis(_ROUND, **({"dtick": 1} if few else {}))


SCALED = {"lora.rank": ("rank", "rank r of the adapters"), "clients": ("clients", "number of clients")}
"""Settings against which results are drawn where several values of them are compared."""


def scaling(comparison: Comparison) -> list[Figure]:
    """Score, ρ and megabytes against rank and against the number of clients, where several were compared."""
    found, by = [], comparison.criterion
    keys = frames.varied(comparison.runs)
    for setting, (short, title) in SCALED.items():
        if setting in keys:
            for result, unit, words in (
                (by.name, wording.axis(by), wording.title(by)),
                ("rho_last", "ρ in the last round (no unit)", "ρ"),
                ("megabytes", "sent in all rounds (MB)", "Megabytes"),
            ):
                found.append(_scaling(comparison, setting, (short, title), result, (unit, words)))
    return [figure for figure in found if figure is not None]


def _scaling(
    comparison: Comparison, key: str, names: tuple[str, str], result: str, words: tuple[str, str]
) -> Figure | None:
    values, ends = tables.results(comparison), tables.bounds(comparison)[result]
    groups: dict[tuple[str, str], list[tuple[float, statistics.Interval]]] = {}
    for setting in frames.settings(comparison.runs):
        if frames.is_missing(setting.values[key]):
            continue
        others = {name: value for name, value in setting.values.items() if name != key}
        found = tables.over_seeds(values, setting, result, ends)
        if not math.isnan(found.mean):
            rest = frames.words({name: value for name, value in others.items() if name != "strategy"})
            groups.setdefault((setting.strategy, rest), []).append((float(setting.values[key]), found))
    if not any(len(points) > 1 for points in groups.values()):
        return None
    rests = list(dict.fromkeys(rest for _, rest in groups))
    looks = [Look(f"{name} {rest}".strip(), name, rest, rests.index(rest)) for name, rest in groups]
    lines = [sorted(points, key=lambda point: point[0]) for points in groups.values()]
    traces = [_scaling_line(look, points) for look, points in zip(looks, lines, strict=True)]
    xs = sorted({x for points in lines for x, _ in points})
    x_axis = marks.axis(names[1], type="log", tickvals=xs, ticktext=[f"{x:g}" for x in xs])
    caption = "Means over seeds; bars: 95 % interval, or from one to the other of two seeds."
    title = f"{words[1]} against {names[0] if names[0] != 'clients' else 'number of clients'}"
    return Figure(f"scaling-{names[0]}-{result}", title, caption, traces, marks.layout(x_axis, marks.axis(words[0])))


def _scaling_line(look: Look, points: Sequence[tuple[float, statistics.Interval]]) -> Trace:
    return look.line(
        x=marks.numbers(x for x, _ in points),
        y=marks.numbers(found.mean for _, found in points),
        meta={"strategy": look.strategy},
        error_y={**marks.bars([found for _, found in points]), "thickness": 1, "width": 3},
        hovertemplate=f"{marks.safe(look.label)}<br>%{{x}}: %{{y:.4g}}<extra></extra>",
    )
