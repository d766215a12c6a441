"""What every figure shares: a figure as Plotly reads it (plain dictionaries), the look of a setting, axes, numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora.report import frames, plots
from fedlora.report.decision import Decision, Standing
from fedlora.report.statistics import Interval

Trace = dict[str, Any]

_DASHES = ("solid", "dot", "dash", "longdash", "dashdot", "longdashdot")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "star", "cross", "triangle-down", "pentagon", "hexagram",
    "hourglass")  # fmt: skip
"""Their number and that of the dashes have no divisor in common: 66 settings are told apart before a pair repeats."""
_GRID = "#e3e6ea"


@dataclass(frozen=True)
class Figure:
    """A plot: where it stands, what it is called, how to read it, and its traces and layout in Plotly's words.

    `choices` are the words of a list from which the reader picks one trace at a time (traces carry `meta.choice`).
    `panels` are the conditions that stand side by side, a panel each (traces carry `meta.panel`), or one of them where
    the reader picks one on top of the page. Where `free`, their x axes are not one, as of costs.
    """

    key: str
    title: str
    caption: str
    traces: Sequence[Trace]
    layout: dict[str, Any]
    choices: Sequence[str] = ()
    wide: bool = False
    height: int = 400
    panels: Sequence[str] = ()
    free: bool = False
    row: int = 170
    """Height of a row of panels, px."""


def safe(text: object) -> str:
    """Text for a figure: Plotly reads a few HTML tags in labels, and what users call things must stay text."""
    return html.escape(str(text), quote=False)


def number(value: Any, digits: int = 5) -> float | None:
    """A number short enough for the page; None, a gap in the line, where there is none."""
    found = float(value) if value is not None else math.nan
    return float(f"{found:.{digits}g}") if math.isfinite(found) else None


def numbers(values: Iterable[Any], digits: int = 5) -> list[float | None]:
    """`number` of each."""
    return [number(value, digits) for value in values]


def bars(found: Sequence[Interval]) -> dict[str, Any]:
    """Error bars of intervals, in Plotly's words; of two values they reach from one to the other."""
    ends = [
        (each.low, each.high) if each.known else (min(each.values), max(each.values)) if each.values else (0.0, 0.0)
        for each in found
    ]
    above = numbers(high - each.mean for (_, high), each in zip(ends, found, strict=True))
    below = numbers(each.mean - low for (low, _), each in zip(ends, found, strict=True))
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below}


@dataclass(frozen=True)
class Look:
    """How a choice is drawn: its strategy's colour, and a dash and symbol for what else it is."""

    label: str
    strategy: str
    rest: str
    """What it is besides its strategy; empty where only strategies are chosen among."""
    place: int
    """Of the rest among all rests."""
    panel: int | None = None
    """Of its condition."""

    @property
    def colour(self) -> str:
        return plots.colour(self.strategy)

    @property
    def symbol(self) -> str:
        return _SYMBOLS[self.place % len(_SYMBOLS)]

    @property
    def meta(self) -> dict[str, Any]:
        """What the page switches traces by."""
        return {"strategy": self.strategy, "rest": self.rest} | ({} if self.panel is None else {"panel": self.panel})

    def line(self, of: str = "", each: str = "", **changes: Any) -> Trace:
        """A line through points, with an entry in the legend.

        Args:
            of: what of the choice it is, in the figure's table: a seed, or the mean of some.
            each: what `customdata` is, in the figure's table.
            changes: further properties, or others.
        """
        meta = self.meta | ({"of": of} if of else {}) | ({"each": each} if each else {})
        return {
            "type": "scatter",
            "mode": "lines+markers",
            "name": safe(self.label),
            "legendgroup": safe(self.label),
            "meta": meta,
            **({"xaxis": f"x{self.panel + 1}", "yaxis": f"y{self.panel + 1}"} if self.panel else {}),
            "line": {"color": self.colour, "dash": _DASHES[self.place % len(_DASHES)], "width": 2},
            "marker": {"color": self.colour, "symbol": self.symbol, "size": 6},
            **changes,
        }


@dataclass(frozen=True)
class Placed(Look):
    """A choice as it stands in a condition, drawn in the condition's panel."""

    standing: Standing = field(kw_only=True)

    @property
    def words(self) -> str:
        """The choice and its condition, for a figure."""
        return safe(self.standing.setting.label)

    @property
    def runs(self) -> list[str]:
        """The ids of its runs, a seed each."""
        return list(self.standing.setting.seeds.values())

    @property
    def seeds(self) -> str:
        """What a mean is over, in words."""
        seeds = [frames.plain(seed) for seed in self.standing.setting.seeds]
        return f"mean of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"


def looks(decided: Decision) -> list[Placed]:
    """The look of every choice in every condition: condition by condition, the best first, controls last. A choice
    looks the same in all of them."""
    found = [
        (panel, each, frames.words({key: each.setting.values[key] for key in decided.choices if key != "strategy"}))
        for panel, condition in enumerate(decided.conditions)
        for each in (*condition.standings, *condition.controls)
    ]
    places = {rest: place for place, rest in enumerate(dict.fromkeys(rest for _, _, rest in found))}
    return [
        Placed(each.choice, each.setting.strategy, rest, places[rest], panel, standing=each)
        for panel, each, rest in found
    ]


def axis(title: str, **changes: Any) -> dict[str, Any]:
    """An axis with its title (quantity and unit)."""
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": _GRID,
        "zeroline": False,
        "automargin": True,
        **changes,
    }


def layout(x: dict[str, Any], y: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The layout of a figure from its two axes."""
    return {"xaxis": x, "yaxis": y, **changes}


def linear_or_log() -> list[dict[str, Any]]:
    """Two buttons that switch the y axis."""
    buttons = [
        {"label": kind, "method": "relayout", "args": [{"yaxis.type": kind, "yaxis.autorange": True}]}
        for kind in ("linear", "log")
    ]
    place = {"type": "buttons", "direction": "right", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
    return [{**place, "showactive": True, "buttons": buttons, "pad": {"t": 0, "b": 4}, "font": {"size": 11}}]
