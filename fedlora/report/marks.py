"""What every figure shares: a figure as Plotly reads it (plain dictionaries), the look of a setting, axes, numbers."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.report import plots
from fedlora.report.frames import Setting
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
    """

    key: str
    title: str
    caption: str
    traces: Sequence[Trace]
    layout: dict[str, Any]
    choices: Sequence[str] = ()
    wide: bool = False
    height: int = 400


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
    """How a setting is drawn: its strategy's colour, and a dash and symbol for what else it is."""

    setting: Setting
    colour: str
    dash: str
    symbol: str

    @property
    def meta(self) -> dict[str, str]:
        """What the page switches traces by."""
        return {"strategy": self.setting.strategy, "rest": self.setting.rest}

    def line(self, **changes: Any) -> Trace:
        """A line through points, with an entry in the legend."""
        return {
            "type": "scatter",
            "mode": "lines+markers",
            "name": safe(self.setting.label),
            "legendgroup": safe(self.setting.label),
            "meta": self.meta,
            "line": {"color": self.colour, "dash": self.dash, "width": 2},
            "marker": {"color": self.colour, "symbol": self.symbol, "size": 6},
            **changes,
        }


def looks(settings: Sequence[Setting], among: Sequence[Setting] = ()) -> list[Look]:
    """The look of every setting, in order.

    Args:
        settings: what is drawn.
        among: the settings of the whole page, where a figure draws them in another order, or not all: the place of a
            setting among these is what gives it the same look everywhere.
    """
    rests = list(dict.fromkeys(setting.rest for setting in (*among, *settings)))
    places = {rest: place for place, rest in enumerate(rests)}
    return [
        Look(
            setting,
            plots.colour(setting.strategy),
            _DASHES[places[setting.rest] % len(_DASHES)],
            _SYMBOLS[places[setting.rest] % len(_SYMBOLS)],
        )
        for setting in settings
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
