"""The numbers of a figure as CSV: what its link 'data' holds, taken from the traces that are drawn."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from fedlora.report.marks import Figure, Trace

Row = dict[str, Any]


def link(figure: Figure) -> str:
    """A figure's CSV as a `data:` address: the page needs no file beside it, and no script."""
    return f"data:text/csv;charset=utf-8,{quote(text(figure), safe=',;:()/')}"


def text(figure: Figure) -> str:
    """A figure's CSV: a row per point with the words of its axes as titles, and both ends of its interval where it has
    one; of a heat map a row per row. Numbers are rounded as they are drawn, to five digits."""
    rows = [row for trace in figure.traces if "hoverinfo" not in trace for row in _rows(figure, trace)]
    titles = list(dict.fromkeys(key for row in rows for key in row))
    lines = io.StringIO()
    writer = csv.DictWriter(lines, titles, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return lines.getvalue()


def _rows(figure: Figure, trace: Trace) -> Iterator[Row]:
    meta = trace.get("meta", {})
    where: Row = {}
    if figure.panels:
        where["condition"] = figure.panels[meta["panel"]] if "panel" in meta else ""
    if figure.choices:
        where["shown"] = figure.choices[meta["choice"]]
    yield from (where | row for row in (_of_map if trace["type"] == "heatmap" else _of_line)(figure, trace))


def _of_map(figure: Figure, trace: Trace) -> Iterator[Row]:
    title = _title(figure, "yaxis")
    columns = [_plain(column).replace("<br>", " ") for column in trace["x"]]
    for label, values in zip(trace["y"], trace["z"], strict=True):
        yield {title: _plain(label), **{column: _known(value) for column, value in zip(columns, values, strict=True)}}


def _of_line(figure: Figure, trace: Trace) -> Iterator[Row]:
    meta, bars = trace.get("meta", {}), {axis: trace.get(f"error_{axis}") for axis in "xy"}
    for place, (x, y) in enumerate(zip(trace["x"], trace["y"], strict=True)):
        row: Row = {"choice": _plain(trace["name"])}
        row |= {"of": meta["of"]} if "of" in meta else {}
        row |= {meta["each"]: _plain(trace["customdata"][place])} if "each" in meta else {}
        row |= {_title(figure, f"{axis}axis"): _known(value) for axis, value in (("x", x), ("y", y))}
        row.pop("", None)  # an axis without words has the choices along it
        for value, bar in ((x, bars["x"]), (y, bars["y"])):
            if bar:
                row |= {"low": _end(value, bar["arrayminus"][place], -1), "high": _end(value, bar["array"][place], 1)}
        yield row


def _end(value: float, half: float | None, side: int) -> Any:
    return "" if half is None else float(f"{value + side * half:.5g}")


def _title(figure: Figure, axis: str) -> str:
    return str(figure.layout[axis]["title"]["text"])


def _plain(label: object) -> str:
    """A label as its user wrote it: figures hold it as HTML."""
    return html.unescape(str(label))


def _known(value: Any) -> Any:
    return "" if value is None else value
