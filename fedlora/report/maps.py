"""Figures without a time axis: final scores, ρ by layer, ρ against the score, the partition."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from fedlora.objective import Score
from fedlora.report import frames, marks, tables, verdict, wording
from fedlora.report.decision import Decision
from fedlora.report.frames import Comparison
from fedlora.report.marks import Figure, Placed, Trace

_ROW_PX, _AROUND_PX, _HIGHEST_PX = 22, 130, 1100
_SIGN_PX, _HALF_PX, _WIDE_PX = 7, 280, 900
"""Width of a letter, and of the columns of a heat map in a figure that stands beside another or alone."""
_LINE_PX, _SHORT_LINE = 17, 24
"""Height of a line of text; letters in a line of a column's label below which nothing is gained by wrapping."""
_MOST_CLIENTS = 500
"""Of more clients the partition's picture shows the first so many."""
_MOST_GAPS = 30
_SCALE = "Viridis"


def final_scores(decided: Decision) -> Figure | None:
    """The final score with its interval, a line per choice and a panel per condition, the best of the first on top."""
    known = [look for look in marks.looks(decided) if not math.isnan(look.standing.score.mean)]
    if not known:
        return None
    rows = max(Counter(look.panel for look in known).values())
    y = marks.axis("", autorange="reversed", type="category")
    cut = wording.cut(decided.criterion)
    caption = f"Mean over seeds with its 95 % interval (Student t{cut}); of two seeds the bar ends at both."
    if decided.labels:
        caption += " In the order of the first condition; of one alone in its own."
    axes = marks.layout(marks.axis(wording.axis(decided.criterion)), y, hovermode="closest")
    return Figure(
        f"final-{decided.criterion.name}",
        f"Final {decided.criterion.title}",
        caption,
        [_final(look) for look in known],
        axes,
        wide=True,
        height=_height(rows),
        panels=decided.labels,
        row=max(_ROW_PX * rows, 90),
    )


def _final(look: Placed) -> Trace:
    score = look.standing.score
    return look.line(
        of=look.seeds,
        x=[marks.number(score.mean)],
        y=[marks.safe(look.label)],
        mode="markers",
        marker={"color": look.colour, "symbol": look.symbol, "size": 9},
        error_x={**marks.bars([score]), "thickness": 1.5, "width": 4},
        showlegend=False,
        hovertemplate=f"{look.words}<br>{verdict.score(score)}<extra></extra>",
    )


def layers(comparison: Comparison, decided: Decision) -> list[Figure]:
    """ρ by module: in the last round for each setting, and round by round for one setting at a time."""
    modules = comparison.modules
    if modules.empty or "rho" not in modules:
        return []
    names = short(sorted(set(modules["module"]), key=by_number))
    found = marks.looks(decided)
    return [_last_round(modules, names, found), _by_round(modules, names, found)]


def _last_round(modules: pd.DataFrame, names: Mapping[str, str], looks: Sequence[Placed]) -> Figure:
    last = modules[modules["round"] == modules.groupby("run_id")["round"].transform("max")]
    found = [(look, last[last["run_id"].isin(look.runs)].groupby("module")["rho"].mean()) for look in looks]
    columns = [(look, values) for look, values in found if len(values)]
    rows = [[marks.number(values.get(module), 4) for _, values in columns] for module in names]
    labels = _Labels.of([look.standing.setting.label for look, _ in columns])
    trace = _heat(labels.texts, list(names.values()), rows)
    trace |= {
        "meta": {"columns": [look.meta for look, _ in columns]},
        "hovertemplate": "%{x}<br>%{y}<br>ρ %{z}<extra></extra>",
    }
    caption = "ρ of each adapted module in the last round, mean over seeds; a column per setting."
    x = marks.axis("setting", type="category", showgrid=False, **({"tickangle": -90} if labels.turned else {}))
    figure = _heat_figure("layers-last", "ρ by layer and setting", caption, [trace], x, names.values())
    return replace(figure, wide=labels.wide, height=figure.height + labels.room)


@dataclass(frozen=True)
class _Labels:
    """The labels of columns, in lines, and the room they take below a map."""

    texts: Sequence[str]
    wide: bool
    """They need the page's whole width."""
    turned: bool
    room: int

    @classmethod
    def of(cls, labels: Sequence[str]) -> _Labels:
        """Side by side as long as that is wide enough, turned by a right angle otherwise."""
        column, longest = _WIDE_PX // len(labels), max(map(len, labels))
        turned = _SIGN_PX * min(_SHORT_LINE, longest) > column
        most = max(1, column // _LINE_PX) if turned else 3
        widths = range(_SHORT_LINE, longest + 1)
        width = next((w for w in widths if all(len(textwrap.wrap(label, w)) <= most for label in labels)), longest)
        lines = [textwrap.wrap(label, width) or [""] for label in labels]
        longest = max(len(line) for own in lines for line in own)
        wide = turned or len(labels) * _SIGN_PX * longest > _HALF_PX
        texts = ["<br>".join(map(marks.safe, own)) for own in lines]
        return cls(texts, wide, turned, _SIGN_PX * longest if turned else 100 if wide else 60)


def _by_round(modules: pd.DataFrame, names: Mapping[str, str], looks: Sequence[Placed]) -> Figure:
    traces: list[Trace] = []
    choices: list[str] = []
    for look in looks:
        own = modules[modules["run_id"].isin(look.runs)]
        if own.empty:
            continue
        table = own.pivot_table(index="module", columns="round", values="rho", aggfunc="mean", sort=False)
        table = table[sorted(table.columns)]
        rows = [marks.numbers(values, 4) for values in table.to_numpy()]
        words = f"{look.words}<br>%{{y}}<br>round %{{x}}: ρ %{{z}}<extra></extra>"
        trace = _heat([int(column) for column in table.columns], [names[m] for m in table.index], rows)
        traces.append(trace | {"meta": {"choice": len(choices)}, "hovertemplate": words})
        choices.append(look.standing.setting.label)
    caption = "ρ of each adapted module, round by round, mean over seeds, for one setting at a time."
    x = marks.axis("round", **({"dtick": 1} if len(traces[0]["x"]) <= 12 else {}), showgrid=False)
    return _heat_figure("layers-rounds", "ρ by layer and round", caption, traces, x, names.values(), choices)


def _heat(x: Sequence[Any], y: Sequence[str], z: Sequence[Sequence[float | None]], title: str = "ρ") -> Trace:
    """A heat map from zero, with gaps between cells where there is room for them."""
    gap = 1 if len(x) <= _MOST_GAPS else 0
    return {
        "type": "heatmap",
        "x": list(x),
        "y": [marks.safe(label) for label in y],
        "z": z,
        "zmin": 0,
        "zmax": max((value for row in z for value in row if value), default=1),
        "colorscale": _SCALE,
        "colorbar": {"title": {"text": title}, "thickness": 12},
        "xgap": gap,
        "ygap": gap,
    }


def _heat_figure(
    key: str,
    title: str,
    caption: str,
    traces: Sequence[Trace],
    x: dict[str, Any],
    rows: Any,
    choices: Sequence[str] = (),
) -> Figure:
    order = [marks.safe(row) for row in reversed(list(rows))]
    y = marks.axis("module", type="category", categoryorder="array", categoryarray=order, showgrid=False)
    return Figure(key, title, caption, traces, marks.layout(x, y), choices, height=_height(len(order)))


def _height(rows: int) -> int:
    return max(280, min(_HIGHEST_PX, _AROUND_PX + _ROW_PX * rows))


def by_number(module: str) -> list[tuple[int, str]]:
    """What modules are sorted by: layer 2 comes before layer 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in module.split(".")]


def short(modules: Sequence[str]) -> dict[str, str]:
    """Module names without the dotted parts with which all of them begin."""
    parts = [name.split(".") for name in modules]
    common = 0
    while len(parts) > 1 and len({tuple(words[: common + 1]) for words in parts}) == 1 and common < len(parts[0]):
        common += 1
    return {name: ".".join(words[common:]) or name for name, words in zip(modules, parts, strict=True)}


def rho_score(comparison: Comparison, decided: Decision) -> list[Figure]:
    """The final score against ρ, a point per run: ρ of round one, and of the last."""
    values, by = tables.results(comparison), comparison.criterion
    found = []
    for name, words in (("rho_first", "round 1"), ("rho_last", "the last round")):
        points = values.dropna(subset=[name, by.name])
        if len(points):
            traces = [
                _cloud(look, own, name, by)
                for look in marks.looks(decided)
                for own in [points[points.index.isin(look.runs)]]
                if len(own)
            ]
            axes = marks.layout(marks.axis(f"ρ in {words} (no unit)"), marks.axis(wording.axis(by)))
            key, title = name.replace("_", "-"), f"ρ in {words} against {by.title}"
            found.append(Figure(key, title, "A point per run.", traces, axes, panels=decided.labels))
    return found


def _cloud(look: Placed, own: pd.DataFrame, rho: str, score: Score) -> Trace:
    seeds = {run: frames.plain(seed) for seed, run in look.standing.setting.seeds.items()}
    return look.line(
        each="seed",
        x=marks.numbers(own[rho]),
        y=marks.numbers(own[score.name]),
        mode="markers",
        marker={"color": look.colour, "symbol": look.symbol, "size": 9, "opacity": 0.85},
        customdata=[marks.safe(seeds[str(run)]) for run in own.index],
        hovertemplate=f"{look.words}, seed %{{customdata}}<br>ρ %{{x:.4g}}, {score.title} %{{y:.4g}}<extra></extra>",
    )


def partitions(comparison: Comparison) -> Figure | None:
    """Training examples by client and label (or group, where labels are not what is learned), for one partition at a
    time."""
    traces: list[Trace] = []
    choices: list[str] = []
    clipped = False
    for digest, seeds in _partitions_in_use(comparison).items():
        summary = comparison.partitions[digest]
        counts = summary["label_counts"][:_MOST_CLIENTS]
        clipped |= len(summary["label_counts"]) > _MOST_CLIENTS
        sizes = [f"{sum(row)} in all" for row in counts]
        clients = [f"client {client}" for client in range(len(counts))]
        cells = [[value or None for value in row] for row in counts]  # none at all stays white
        labels = [marks.safe(label) for label in summary["labels"]]
        trace = _heat(labels, clients, cells, "examples")
        trace |= {
            "customdata": [[size] * len(labels) for size in sizes],
            "meta": {"choice": len(choices)},
            "hoverongaps": False,
            "hovertemplate": "%{y} (%{customdata})<br>%{x}: %{z}<extra></extra>",
        }
        traces.append(trace)
        choices.append(f"{seeds}: {summary.get('partitioner', 'partition')}, hash {digest}")
    if not traces:
        return None
    kind = "label" if comparison.labelled else "group"
    caption = f"Training examples of each client by {kind}; white: none." + (
        f" Of more clients the first {_MOST_CLIENTS} are shown." if clipped else ""
    )
    rows = max(len(trace["y"]) for trace in traces)
    axes = marks.layout(
        marks.axis(kind, type="category", showgrid=False),
        marks.axis("client", type="category", autorange="reversed", showgrid=False),
    )
    return Figure("partition", "The partition", caption, traces, axes, choices, True, _height(rows) + 60)


def _partitions_in_use(comparison: Comparison) -> dict[str, str]:
    """The partitions that runs have and that are known, by hash, with the seeds and settings they belong to."""
    keys = ["seed", *frames.partition_keys(frames.varied(comparison.runs))]
    found: dict[str, str] = {}
    for row in comparison.runs.to_dict("records"):
        if row["partition"] in comparison.partitions and row["partition"] not in found:
            words = (f"{key} {frames.plain(row[key])}" for key in keys if not frames.is_missing(row[key]))
            found[row["partition"]] = ", ".join(words)
    return found
