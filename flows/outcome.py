"""What a sweep leaves: table, pictures, report, the leaderboard on its pages, and the champion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
from prefect.artifacts import create_markdown_artifact

from fedlora.errors import FedloraError, counted
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
    if found:
        told.say(f"comparing {counted(len(found), 'run')}")
        comparison.frame(found).to_csv(folder.path / "comparison.csv", index=False)
        comparison.figures(found, folder.path, plan.name)
        if plan.champion:
            settings = {str(state.run): state.settings for state in folder.having("finished")}
            folder.champion = champion.after_sweep(parent.uri, plan.name, settings).reason
            folder.save(plan)
    parents.publish(parent, folder.path, FILES, [result.run for result in found])
    pages = [store.run_page(parent.experiment, result.run) for result in found]
    links = {"charts": store.sweep_page(parent.experiment, parent.run)}
    said: Sequence[str] = ()
    since = None
    if found and (written := _report(folder, parent, told)):
        links["report"] = store.artifact_page(parent.experiment, parent.run, SHOWN["report"])
        since = changes.since_last(folder, parent.uri)
        said = [*written.sentences, f"Since the last: {since.line}."]
        changes.publish(since, plan.name)
    if since and since.written:
        told.say(since.line)
        links["what changed"] = store.artifact_page(parent.experiment, parent.run, f"report/{since.written.page.name}")
    parents.describe(parent, description(plan, folder, found, pages, links, said))
    # On Prefect's page a link needs the server's name.
    pages = [where.mlflow_page(parent.uri, page) for page in pages]
    links = {name: where.mlflow_page(parent.uri, page) for name, page in links.items()}
    board = description(plan, folder, found, pages, links, said)
    told.results(links["charts"], folder.path)
    create_markdown_artifact(board, key="sweep-summary", description=plan.name)
    return since


def _report(folder: SweepFolder, parent: Parent, told: Progress) -> report.Written | None:
    """Write and log the report; None where that went wrong, for a report that fails must not lose the sweep."""
    try:
        return report.write_report(folder.instance, folder.path / "report", parent.uri)
    except FedloraError as error:
        told.say(f"no report: {error}")
        return None


def description(
    plan: Sweep,
    folder: SweepFolder,
    found: Sequence[Result] = (),
    pages: Sequence[str] = (),
    links: Mapping[str, str] = MappingProxyType({}),
    said: Sequence[str] = (),
) -> str:
    """The sweep in Markdown: its verdict, a leaderboard with a link to each run (its page), what is missing, further
    links by their words, and what it was."""
    lines = [f"## Sweep {plan.name}", *(f"\n{report.plain(sentence)}" for sentence in said)]
    what = [
        f"base `{Path(plan.base).name}`, grid `{json.dumps(plan.grid)}`, set `{json.dumps(plan.common, default=str)}`"
    ]
    if found:
        table = comparison.frame(found)
        lines += ["", *_leaderboard(plan.varied, table.assign(page=list(pages))), "", comparison.shared(table), ""]
    for status in ("failed", "skipped"):
        lines += [f"* {status}: {state.label}: {state.reason}" for state in folder.having(status)]
    if folder.champion:
        lines += ["", folder.champion]
    ways = " · ".join(f"[{words}]({page})" for words, page in links.items())
    return "\n".join([*lines, "", ways, "", *what, "", f"Table, pictures and state: `{folder.path}`"])


def _leaderboard(varied: Sequence[str], table: pd.DataFrame) -> list[str]:
    means, spreads = comparison.over_seeds(table, varied)
    keys = [str(name) for name in means.index.names]
    titles = ["", *keys, "runs", *comparison.COLUMNS]
    rows = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    accuracy = means["accuracy"].fillna(-1.0).tolist()
    best_first = sorted(range(len(accuracy)), key=lambda position: -accuracy[position])  # equals stay as they are
    for place, position in enumerate(best_first, start=1):
        index = means.index[position]
        names = index if isinstance(index, tuple) else (index,)
        values = [
            comparison.cell(name, means[name].iloc[position], spreads[name].iloc[position])
            for name in comparison.COLUMNS
        ]
        links = _links(table, keys, names)
        words = [str(name).replace("|", "\\|") for name in names]
        rows.append(f"| {place} | {' | '.join([*words, links, *values])} |")
    return rows


def _links(table: pd.DataFrame, keys: Sequence[str], values: Sequence[Any]) -> str:
    """A link to each run of a setting, named after its seed."""
    rows = table
    for key, value in zip(keys, values, strict=True):
        if key in rows:
            rows = rows[rows[key] == value]
    names = rows["seed"] if "seed" in rows else ["run"] * len(rows)
    return " ".join(f"[{name}]({page})" for name, page in zip(names, rows["page"], strict=True))
