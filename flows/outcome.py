"""What a sweep leaves: table, pictures, report, the leaderboard on its pages, and the champion."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from prefect.artifacts import create_markdown_artifact

from fedlora.errors import FedloraError, counted
from fedlora.objective import Score
from fedlora.report import frames
from fedlora.sweep import comparison
from fedlora.sweep.comparison import Result
from fedlora.sweep.folder import STATE, SweepFolder
from fedlora.sweep.plan import Sweep
from flows import changes, progress, report
from flows.changes import Since
from flows.progress import Progress
from mlflow_tracking import champion, parents, store
from mlflow_tracking.parents import Parent
from tasks import where

SHOWN = {
    "report": "report/report.html",
    "verdict": "report/verdict.json",
    "picture": "comparison.png",
    "conditions": "conditions.png",
    "table": "comparison.csv",
}
"""What a person looks at in a sweep's folder."""
CHANGES = "report/changes.json"
"""What changed since the last execution, where there was one."""
FILES = (STATE, "comparison.csv", "comparison.png", "conditions.png")
_BESIDE = ("ρ first", "ρ last", "ρ floor", "MB")
"""Beside the score; as many as fit beside a run's facts in MLflow; the report has the others."""
_SPACE = "&nbsp;"
"""Where a cell is not to be broken, and between cells: MLflow sets them without a gap."""


def results(folder: SweepFolder, varied: Sequence[str]) -> list[Result]:
    """The finished runs of a sweep, as they are in MLflow."""
    if folder.parent is None:
        return []
    settings = {
        str(state.run): {key: state.settings[key] for key in varied if key in state.settings}
        for state in folder.having("finished")
    }
    return parents.results(Parent(**folder.parent), settings)


def is_whole(plan: Sweep, folder: SweepFolder) -> bool:
    """Whether a sweep that ended has left in its folder all that `publish` writes."""
    if not folder.having("finished"):
        return True
    written = all((folder.path / name).is_file() for name in (*FILES, *SHOWN.values()))
    return written and (folder.champion is not None or not plan.champion)


def publish(plan: Sweep, folder: SweepFolder, parent: Parent) -> Since | None:
    """Compare the finished runs in files, on the sweep's page in MLflow, and on the flow run's page in Prefect.

    Returns:
        What changed since the last execution; None where there is no report to compare.
    """
    told = progress.current()
    found = results(folder, plan.varied)
    chosen: Sequence[champion.Decision] = ()
    if found:
        told.say(f"comparing {counted(len(found), 'run')}")
        comparison.frame(found).to_csv(folder.path / "comparison.csv", index=False)
        comparison.figures(found, folder.path, plan.name)
        if plan.champion:
            settings = {str(state.run): state.settings for state in folder.having("finished")}
            chosen = champion.after_sweep(parent.uri, plan.name, settings, plan.world)
            folder.champion = "\n".join(each.reason for each in chosen)
            folder.save(plan)
    parents.publish(parent, folder.path, FILES, [result.run for result in found])
    written = _report(folder, parent, told) if found else None
    since = _since(plan, folder, parent, told) if written else None
    changed = since.written.page.name if since and since.written else None
    board = Board(
        pages=[store.run_page(parent.experiment, result.run) for result in found],
        ways=_ways(folder, parent, found, written is not None, changed),
        models={each.model: each.page for each in chosen if each.version},
        said=[*(written.sentences if written else ()), *([f"Since the last: {since.line}."] if since else ())],
    )
    parents.describe(parent, description(plan, folder, found, board))
    on_server = board.on(parent.uri)  # on Prefect's page a link needs the server's name
    told.results(on_server.ways["charts"], folder.path)
    summary = f"## Sweep {plan.name}\n{description(plan, folder, found, on_server)}"
    create_markdown_artifact(summary, key="sweep-summary", description=plan.name)
    if written:
        report.show_answers(written)
    return since


def _since(plan: Sweep, folder: SweepFolder, parent: Parent, told: Progress) -> Since:
    """Compare with the last execution, and say what changed."""
    since = changes.since_last(folder, parent.uri)
    changes.publish(since, plan.name)
    if since.written:
        told.say(since.line)
    return since


def _ways(
    folder: SweepFolder, parent: Parent, found: Sequence[Result], reported: bool, changed: str | None
) -> dict[str, str]:
    """What a sweep's page leads to, by their words: report, charts, what changed (the name of its page), pictures."""

    def file(name: str) -> str:
        return store.artifact_page(parent.experiment, parent.run, name)

    ways = {"report": file(SHOWN["report"])} if reported else {}
    ways["charts"] = store.view_page(parent.experiment, parent.run)
    if changed:
        ways["what changed"] = file(f"report/{changed}")
    score = found[0].scores[0].title if found else "score"
    for words, name in ((f"{score} and ρ", SHOWN["picture"]), ("conditions R, P, Q", SHOWN["conditions"])):
        if (folder.path / name).is_file():
            ways[words] = file(f"{parents.COMPARISON}/{name}")
    return ways


def _report(folder: SweepFolder, parent: Parent, told: Progress) -> report.Written | None:
    """Write and log the report; None where that went wrong, for a report that fails must not lose the sweep."""
    try:
        return report.write_report(folder.instance, folder.path / "report", parent.uri)
    except FedloraError as error:
        told.say(f"no report: {error}")
        return None


@dataclass(frozen=True)
class Board:
    """What a sweep's description shows besides the sweep: a page per run, in the order of the results, further ways by
    their words, registered models by their names, the verdict."""

    pages: Sequence[str] = ()
    ways: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    said: Sequence[str] = ()

    def on(self, uri: str) -> Board:
        """The same with whole addresses of the server that shows the store."""
        ways, models = (
            {words: where.mlflow_page(uri, page) for words, page in each.items()} for each in (self.ways, self.models)
        )
        return replace(self, pages=[where.mlflow_page(uri, page) for page in self.pages], ways=ways, models=models)


_EMPTY = Board()


def description(plan: Sweep, folder: SweepFolder, found: Sequence[Result] = (), board: Board = _EMPTY) -> str:
    """The sweep in Markdown: ways to what it left (MLflow folds all but the first lines), its verdict, a leaderboard
    per condition with a link to each run, what is missing, and what it was."""
    lines = [_linked(board.ways), *(f"\n{report.plain(each)}" for each in board.said)]
    if board.models:
        lines += ["", f"Champions: {_linked(board.models)}"]
    what = [
        f"base `{Path(plan.base).name}`, grid `{json.dumps(plan.grid)}`, set `{json.dumps(plan.common, default=str)}`"
    ]
    if found:
        table = comparison.frame(found).assign(page=list(board.pages))
        lines += ["", *_leaderboards(plan, table, found[0].scores[0]), comparison.shared(table), ""]
    for status in ("failed", "skipped"):
        lines += [f"* {status}: {state.label}: {state.reason}" for state in folder.having(status)]
    lines += [f"\n{report.plain(reason)}" for reason in (folder.champion or "").splitlines()]
    return "\n".join([*lines, "", *what, "", f"Table, pictures and state: `{folder.path}`"])


def _linked(pages: Mapping[str, str]) -> str:
    return " · ".join(f"[{words}]({page})" for words, page in pages.items())


def _leaderboards(plan: Sweep, table: pd.DataFrame, criterion: Score) -> Iterator[str]:
    """A leaderboard per condition: places mean something within one only."""
    varied = [key for key in plan.varied if key not in plan.world]
    groups = table.groupby(plan.world, sort=False, dropna=False) if plan.world else [((), table)]
    for values, rows in groups:
        if plan.world:
            yield from (f"**{report.plain(frames.words(dict(zip(plan.world, values, strict=True))))}**", "")
        yield from (*_leaderboard(varied, rows, criterion), "")


def _leaderboard(varied: Sequence[str], table: pd.DataFrame, criterion: Score) -> list[str]:
    columns = (criterion.title, *_BESIDE)
    means, spreads = comparison.over_seeds(table, varied, columns)
    keys = [str(name) for name in means.index.names]
    titles = ["", *keys, "runs", *columns]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    merits = (criterion.sign * means[criterion.title]).fillna(-math.inf).tolist()
    best_first = sorted(range(len(merits)), key=lambda position: -merits[position])  # equals stay as they are
    for place, position in enumerate(best_first, start=1):
        index = means.index[position]
        names = index if isinstance(index, tuple) else (index,)
        values = [
            comparison.cell(name, means[name].iloc[position], spreads[name].iloc[position]).replace(" ", _SPACE)
            for name in columns
        ]
        links = _links(table, keys, names)
        words = [str(name).replace("|", "\\|") for name in names]
        rows.append(f"| {place} | {' | '.join([*words, links, *(_SPACE * 2 + text for text in values)])} |")
    return rows


def _links(table: pd.DataFrame, keys: Sequence[str], values: Sequence[Any]) -> str:
    """A link to each run of a setting, named after its seed."""
    rows = table
    for key, value in zip(keys, values, strict=True):
        if key in rows:
            rows = rows[rows[key] == value]
    names = rows["seed"] if "seed" in rows else ["run"] * len(rows)
    return " ".join(f"[{name}]({page})" for name, page in zip(names, rows["page"], strict=True))
