"""Writes a report: one HTML page that needs nothing else, and the CSV files beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

import fedlora
from fedlora.errors import counted, saving
from fedlora.files.atomic import write_atomic, write_json
from fedlora.report import (
    answers,
    boards,
    changewords,
    curves,
    figuredata,
    maps,
    marks,
    measures,
    pareto,
    tables,
    verdict,
    views,
    wording,
)
from fedlora.report.changes import Changes
from fedlora.report.decision import Decision, decide
from fedlora.report.frames import Comparison
from fedlora.report.marks import Figure, Look

PAGE = "report.html"
VERDICT = "verdict.json"
"""What the comparison comes to, for machines."""
_MOST_PANELS = 24
"""Of more conditions the page shows one at first."""
TABLES = ("runs", "rounds", "leaderboard", "paired", "modules")
"""The CSV files beside the page."""
CHANGES = ("changes.html", "changes.json", "changes.csv")
"""What is written of two comparisons side by side."""


def write(comparison: Comparison, folder: Path, decided: Decision | None = None) -> Path:
    """Write `report.html` and `runs`, `rounds`, `leaderboard`, `paired` and `modules` as CSV; returns the page's path.

    Args:
        comparison: what is compared.
        folder: where to.
        decided: what it comes to, where that is known already.

    Raises:
        FedloraError: there is no finished run to compare.
        RunFolderError: the folder cannot be written.
    """
    decided = decided or decide(comparison)
    page = render(comparison, decided)
    files = {
        "runs": comparison.runs,
        "rounds": comparison.rounds,
        "leaderboard": boards.leaderboard_frame(decided),
        "paired": boards.paired_frame(decided),
        "modules": comparison.modules,
    }
    with saving(folder, "another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in files.items():
            write_atomic(folder / f"{name}.csv", _csv(table))
        write_json(folder / VERDICT, verdict.to_json(decided))
        write_atomic(folder / PAGE, page.encode())
    return folder / PAGE


def _csv(table: pd.DataFrame) -> bytes:
    return b"" if table.empty and not len(table.columns) else table.to_csv(index=False).encode()


def write_changes(changes: Changes, folder: Path) -> Path:
    """Write `changes.html`, and the same as `changes.json` and `changes.csv`; returns the page's path.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    page = render_changes(changes)
    with saving(folder, "another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "changes.csv", _csv(changewords.frame(changes)))
        write_json(folder / "changes.json", changewords.to_json(changes))
        write_atomic(folder / CHANGES[0], page.encode())
    return folder / CHANGES[0]


def render_changes(changes: Changes) -> str:
    """The page of what changed, as text."""
    drawn = changewords.figure(changes)
    found = [drawn] if drawn else []
    return _render(
        "changes.html", f"{changes.before} → {changes.after}", found, changewords.looks(changes), changes.conditions,
        changes=changes, told=changewords, conditions_of=list(dict.fromkeys(cell.condition for cell in changes.cells)),
        drawn=found, by=changes.criterion, wording=wording,
    )  # fmt: skip


def render(comparison: Comparison, decided: Decision) -> str:
    """The page as text."""
    sections, known = _figures(comparison, decided), measures.curves(comparison)
    every = [figure for figures in sections.values() for figure in figures]
    return _render(
        "report.html", comparison.title, every, marks.looks(decided), decided.labels,
        comparison=comparison, figures=sections, views=views, decided=decided, verdict=verdict, boards=boards,
        answers=answers.side_by_side(comparison, decided),
        measures=[measures.of(condition, known) for condition in decided.conditions],
        sharing=tables.sharing(comparison), by=comparison.criterion, wording=wording,
        target=measures.target_words(comparison.criterion),
    )  # fmt: skip


def _render(
    template: str, title: str, every: Sequence[Figure], looks: Sequence[Look], conditions: Sequence[str], **content: Any
) -> str:
    """A page with its figures.

    Args:
        template: its content.
        title: its title.
        every: the figures that the template places.
        looks: what is switched on and off.
        conditions: what one is picked of.
        content: what the template speaks of.
    """
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedlora.report", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["counted"] = counted
    return environment.get_template(template).render(
        title=title,
        version=fedlora.__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        plotly=Markup(get_plotlyjs()) if every else "",  # noqa: S704 (the library's own script)
        data=_script_json({figure.key: _figure(figure) for figure in every}),
        strategies={look.strategy: look.colour for look in looks},
        rests=list(dict.fromkeys(look.rest for look in looks)),
        conditions=conditions,
        most_panels=_MOST_PANELS,
        csv=figuredata.link,
        **content,
    )


def _figures(comparison: Comparison, decided: Decision) -> dict[str, list[Figure]]:
    by_key = {figure.key: figure for figure in curves.all_curves(comparison, decided)}
    final = maps.final_scores(decided)
    partition = maps.partitions(comparison)
    chosen = {
        "score": (f"{comparison.criterion.name}-rounds", f"{comparison.criterion.name}-megabytes"),
        "rho": ("rho-rounds",),
        "local": ("gap", "condition-R", "condition-P", "condition-Q"),
    }
    sections = {name: [by_key[key] for key in keys if key in by_key] for name, keys in chosen.items()}
    return {
        "final": [final] if final else [],
        "pareto": pareto.figures(decided),
        **sections,
        "layers": maps.layers(comparison, decided),
        "related": maps.rho_score(comparison, decided),
        "scaling": curves.scaling(comparison),
        "partition": [partition] if partition else [],
    }


def _figure(figure: Figure) -> dict[str, Any]:
    layout = {
        "height": figure.height,
        "margin": {"l": 60, "r": 16, "t": 30, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#1f2933"},
        "hoverlabel": {"align": "left"},
        "showlegend": any(trace.get("type") == "scatter" and trace.get("showlegend", True) for trace in figure.traces),
        **figure.layout,
    }
    if figure.panels:
        panels = [marks.safe(label) for label in figure.panels]
        layout["meta"] = {"panels": panels, "free": figure.free, "row": figure.row}
    return {"data": list(figure.traces), "layout": layout}


def _script_json(content: Any) -> Markup:
    """JSON that can stand in a script element: no sign in it can end the element or open a comment."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704 (made safe above)
