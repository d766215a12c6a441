"""Score against what it costs, with the front of those that no other choice beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora.report import marks, measures, verdict
from fedlora.report.decision import Condition, Decision, Standing
from fedlora.report.frames import Setting
from fedlora.report.marks import Figure, Look, Trace

COSTS = {
    "megabytes": ("Accuracy against megabytes", "sent both ways in the whole run (MB)"),
    "seconds": ("Accuracy against seconds", "wall time in rounds (s)"),
    "server_seconds": ("Accuracy against the server's seconds", "reading and aggregating (s)"),
}
"""By cost: title and x axis."""


def figures(decided: Decision, settings: Sequence[Setting]) -> list[Figure]:
    """A figure for each cost that was measured; one condition at a time.

    Args:
        decided: the comparison, condition by condition.
        settings: in the page's order, for their looks.
    """
    found = [_figure(decided, settings, cost) for cost in COSTS]
    return [figure for figure in found if figure]


def _figure(decided: Decision, settings: Sequence[Setting], cost: str) -> Figure | None:
    traces: list[Trace] = []
    for index, condition in enumerate(decided.conditions):
        traces += _condition(condition, settings, cost, index)
    if not traces:
        return None
    title, words = COSTS[cost]
    caption = "Means over seeds. The line joins those that no other choice beats in both: less cost or a higher score."
    axes = marks.layout(
        marks.axis(words, rangemode="tozero"), marks.axis("final test accuracy (share)"), hovermode="closest"
    )
    return Figure(f"pareto-{cost}", title, caption, traces, axes, decided.labels)


def _condition(condition: Condition, settings: Sequence[Setting], cost: str, index: int) -> list[Trace]:
    known = [each for each in condition.standings if not math.isnan(each.costs[cost])]
    if len(known) < 2:
        return []
    points = [(each.costs[cost], each.score.mean) for each in known]
    looks = marks.looks([each.setting for each in known], settings)
    front = measures.front(points)
    line = {
        "type": "scatter",
        "mode": "lines",
        "x": marks.numbers(points[place][0] for place in front),
        "y": marks.numbers(points[place][1] for place in front),
        "line": {"color": "#8a94a0", "dash": "dot", "width": 1.5},
        "hoverinfo": "skip",
        "showlegend": False,
        "visible": index == 0,
        "meta": {"choice": index},
    }
    return [line, *(_point(look, each, cost, index) for look, each in zip(looks, known, strict=True))]


def _point(look: Look, each: Standing, cost: str, index: int) -> Trace:
    spent = f"{each.costs[cost]:.4g} {COSTS[cost][1]}"
    return look.line(
        x=[marks.number(each.costs[cost])],
        y=[marks.number(each.score.mean)],
        mode="markers+text",
        text=[marks.safe(each.choice)],
        textposition="top center",
        textfont={"size": 11},
        cliponaxis=False,
        marker={"color": look.colour, "symbol": look.symbol, "size": 10},
        showlegend=False,
        visible=index == 0,
        meta={**look.meta, "choice": index},
        hovertemplate=f"{marks.safe(each.choice)}<br>{verdict.score(each.score)}<br>{spent}<extra></extra>",
    )
