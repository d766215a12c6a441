"""The commands `fedlora sweep` and `fedlora report`; heavy imports happen inside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.local import environment, private_server
from fedlora.errors import FedloraError, counted
from fedlora_cli import output

if TYPE_CHECKING:
    from fedlora.sweep.folder import SweepFolder
    from fedlora.sweep.plan import Sweep


def sweep(
    file: Annotated[str, typer.Argument(metavar="NAME|FILE.yaml", help="A sweep of deployments/sweeps, or a file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings for all runs of the sweep.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs, with time and memory as measured by a short trial.")
    ] = False,
    parallel: Annotated[int | None, typer.Option(min=1, metavar="N", help="Runs side by side.")] = None,
    pool: Annotated[
        str | None, typer.Option(metavar="NAME", help="Hand the runs to the workers of this Prefect work pool.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew; otherwise what has finished before is not repeated.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before.")] = False,
) -> None:
    """A grid of runs over strategies, seeds and anything else, compared in one table. Interrupted, it is continued.

    For example: fedlora sweep demo rounds=4
    """
    environment.prepare("CRITICAL")  # before anything that imports Prefect: its settings are read once
    if not (dry_run or pool):
        private_server.begin_imports()
    from deployments.shipped import PRESETS, SWEEPS
    from fedlora.config import configfile
    from fedlora.files import home
    from fedlora.sweep import plan as sweeps
    from flows import checks

    source = str(Path(file).expanduser().absolute()) if file.endswith(configfile.YAML) else file
    changes = configfile.absolute_paths(configfile.parse_overrides(overrides or []))
    plan = sweeps.load(source, changes, PRESETS, SWEEPS)
    if not dry_run:
        output.busy(f"looking at the {counted(len(plan.cells), 'run')} of sweep {plan.name}")
    known = {} if fresh else _known(plan)
    finished = [digest for digest, status in known.items() if status == "finished"]
    refused = {} if pool else checks.of_sweep(plan, finished)  # data and models are where the workers are
    for config in checks.stores_of(plan):
        checks.servers(config)
    if dry_run:
        _list(plan, known, refused, parallel)
        return
    from flows import handover  # Prefect: what is wrong was told before
    from flows import sweep as flow
    from flows.progress import shown_on
    from tasks import interruption  # Prefect: what is wrong was told before

    if pool:
        _need_server(pool)
        handover.check(pool)
    try:
        with shown_on(sys.stdout) as shown, private_server.available(), interruption.marked():
            named = flow.run_sweep.with_options(flow_run_name=f"sweep {plan.name}")
            folder = Path(named(source, changes, parallel, pool, fresh, retry_failed))
    except KeyboardInterrupt:
        print(f"stopped; what is finished is kept in {home.runs()} and MLflow. The same command goes on from there")
        raise
    _show(plan, folder, shown.flow_run)


def _need_server(pool: str) -> None:
    from prefect.settings import get_current_settings

    if not get_current_settings().api.url:
        raise FedloraError(
            f"--pool {pool} needs a Prefect server that its workers share: `fedlora up`, or set PREFECT_API_URL"
        )


def _show(plan: Sweep, path: Path, flow_run: str) -> None:
    """The table, what is missing from it, and where to look."""
    from fedlora.sweep.folder import SweepFolder
    from fedlora_cli import tables
    from flows import outcome
    from mlflow_tracking import views
    from tasks import where

    folder = SweepFolder.read(path)
    if folder is None or folder.parent is None:
        raise FedloraError(f"{path} does not hold the state of a sweep")
    print()
    tables.verdict(_said(path / outcome.SHOWN["verdict"]), sys.stdout)
    tables.verdict(_said(path / outcome.CHANGES), sys.stdout)
    tables.compared(outcome.results(folder, plan.varied), plan.varied, sys.stdout)
    _print_left(folder, "failed")
    _print_left(folder, "skipped")
    if folder.champion:
        print(f"\n{folder.champion}")
    print()
    for name, file in outcome.SHOWN.items():
        if (path / file).is_file():
            print(f"{name:<17} {path / file}")
    page = views.page(**folder.parent)
    print("\n".join(where.lines(folder.parent["uri"], page, flow_run)))
    if folder.having("failed"):
        raise typer.Exit(1)


def _said(file: Path) -> list[str]:
    """The verdict that was written beside the report; nothing where there was none."""
    try:
        return [str(sentence) for sentence in json.loads(file.read_text("utf-8"))["verdict"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _print_left(folder: SweepFolder, status: Any) -> None:
    for state in folder.having(status):
        print(f"{status}: {state.label}: {state.reason}")


def _known(plan: Sweep) -> dict[str, str]:
    """How runs of a sweep stand in its latest execution, by digest; those that could not begin are as new."""
    from fedlora.files import home
    from fedlora.sweep.folder import SweepFolder

    latest = SweepFolder.latest(home.sweeps(), plan)
    return {str(state.digest): str(state.status) for state in latest.cells if not state.refused} if latest else {}


def _list(plan: Sweep, known: Mapping[str, str], refused: Mapping[str, str], parallel: int | None) -> None:
    """What would be run, how it stands, and what it would take."""
    from fedlora.sweep import estimate
    from fedlora_cli import tables

    stands = {**known, **dict.fromkeys(refused, "cannot begin")}
    todo = [cell for cell in plan.cells if stands.get(cell.digest, "waiting") == "waiting"]
    if todo:
        print("trying a little of it", flush=True)
    costs = estimate.sweep(todo)
    tables.planned(plan, stands, costs, parallel or 1, sys.stdout)
    for cell in plan.cells:
        if cell.digest in refused:
            print(f"cannot begin: {cell.label}: {refused[cell.digest]}")
    if refused:
        raise typer.Exit(1)


def report(
    source: Annotated[
        str,
        typer.Argument(metavar="SWEEP|EXPERIMENT", help="A sweep (or one execution of it), or an MLflow experiment."),
    ] = "latest",
    other: Annotated[
        str | None,
        typer.Argument(
            metavar="[LATER]",
            help="Another: what changed from the first to it. The first may be 'previous': the execution before it.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to. Without it: the sweep's folder.")] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="Its runs alone, where an experiment holds runs of several tasks."),
    ] = None,
    only_verdict: Annotated[
        bool, typer.Option("--verdict", help="Print what the comparison comes to, and write nothing.")
    ] = False,
) -> None:
    """Tables, plots and statistics of a sweep or experiment, as one HTML page and CSV files.

    Without a name: the sweep that ended last. With two: both side by side, and what changed.
    For example: fedlora report previous demo-seeds
    """
    environment.prepare("CRITICAL")
    from fedlora_cli import tables

    if other is not None:
        _changes(source, other, out, only_verdict, task)
        return
    if only_verdict:
        from fedlora.report import verdict
        from fedlora.report.decision import decide
        from mlflow_tracking import compare

        tables.verdict(verdict.sentences(decide(compare.gather(source, task=task))), sys.stdout)
        return
    from flows.report import write_report

    written = write_report(source, out, task=task)
    tables.verdict(written.sentences, sys.stdout)
    print(f"{written.comparison.title}: {counted(len(written.comparison.runs), 'run')}")
    print(f"report            {written.page}\ntables            {written.page.parent}/*.csv")
    if written.source.parent is not None:
        print(f"MLflow            {written.link}")


def _changes(before: str, after: str, out: Path | None, only_verdict: bool, task: str | None) -> None:
    """What changed from one to the other, in words and as a table; and as a page unless only words are wanted."""
    from fedlora.report import changewords
    from fedlora_cli import tables
    from flows import changes

    if only_verdict:
        tables.verdict(changewords.sentences(changes.between(before, after, task=task)[0]), sys.stdout)
        return
    written = changes.write(before, after, out, task=task)
    tables.changed(written.changes, sys.stdout)
    tables.verdict(written.sentences, sys.stdout)
    print(f"changes           {written.page}\ntables            {written.page.parent}/changes.*")
    if not written.link.startswith("file:"):
        print(f"MLflow            {written.link}")
