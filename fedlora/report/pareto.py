"""Score against what it costs, with the front of those that no other choice beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlora.report import marks, measures, verdict, wording
from fedlora.report.costs import COSTS
from fedlora.report.decision import Decision
from fedlora.report.marks import Figure, Placed, Trace


def figures(decided: Decision) -> list[Figure]:
    """A figure for each cost that was measured, a panel per condition; controls are no candidates, and not in it."""
    found = [_figure(decided, cost) for cost in COSTS]
    return [figure for figure in found if figure]


def _figure(decided: Decision, cost: str) -> Figure | None:
    looks = [look for look in marks.looks(decided) if not math.isnan(look.standing.costs[cost])]
    traces: list[Trace] = []
    for panel, condition in enumerate(decided.conditions):
        known = [look for look in looks if look.panel == panel and look.standing in condition.standings]
        traces += _condition(known, cost, decided.criterion.sign) if len(known) > 1 else []
    if not traces:
        return None
    title, words = f"{wording.title(decided.criterion)} against {COSTS[cost].figure}", COSTS[cost].axis
    front = f"less cost or a {'higher' if decided.criterion.higher_is_better else 'lower'} score"
    caption = f"Means over seeds. The line joins those that no other choice beats in both: {front}."
    axes = marks.layout(
        marks.axis(words, rangemode="tozero"), marks.axis(wording.axis(decided.criterion)), hovermode="closest"
    )
    return Figure(f"pareto-{cost}", title, caption, traces, axes, panels=decided.labels, free=True)


def _condition(known: Sequence[Placed], cost: str, sign: int) -> list[Trace]:
    points = [(look.standing.costs[cost], look.standing.score.mean) for look in known]
    front = measures.front(points, sign)
    drawn = known[0].line(
        mode="lines",
        name="front",
        x=marks.numbers(points[place][0] for place in front),
        y=marks.numbers(points[place][1] for place in front),
        line={"color": "#8a94a0", "dash": "dot", "width": 1.5},
        hoverinfo="skip",
        showlegend=False,
    )
    del drawn["marker"], drawn["legendgroup"]
    front_of = {"meta": {"panel": known[0].panel}}  # whatever strategies are switched off
    return [drawn | front_of, *(_point(look, cost) for look in known)]


def _point(look: Placed, cost: str) -> Trace:
    spent, score = look.standing.costs[cost], look.standing.score
    return look.line(
        of=look.seeds,
        x=[marks.number(spent)],
        y=[marks.number(score.mean)],
        mode="markers+text",
        text=[marks.safe(look.label)],
        textposition="top center",
        textfont={"size": 11},
        cliponaxis=False,
        marker={"color": look.colour, "symbol": look.symbol, "size": 10},
        showlegend=False,
        hovertemplate=f"{look.words}<br>{verdict.score(score)}<br>{spent:.4g} {COSTS[cost].axis}<extra></extra>",
    )
