"""A grid of federated runs: one flow run per cell under one parent, and the comparison of what came of them.

prefect deployment run 'sweep/on-demand' -p sweep=demo -p 'overrides={"rounds": 3}'
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

from deployments.local import environment

environment.prepare()

from prefect import flow, runtime  # noqa: E402 (the environment must be ready first)
from prefect.states import Completed  # noqa: E402
from pydantic import Field  # noqa: E402

from deployments import form  # noqa: E402
from deployments.shipped import DEPLOYMENTS, PRESETS, SWEEPS  # noqa: E402
from deployments.states import REGRESSION  # noqa: E402
from fedlora import objective  # noqa: E402
from fedlora.config import configfile  # noqa: E402
from fedlora.errors import FedloraError, counted  # noqa: E402
from fedlora.files import home, lock  # noqa: E402
from fedlora.sweep import plan as sweeps  # noqa: E402
from fedlora.sweep.folder import SweepFolder  # noqa: E402
from fedlora.sweep.plan import Cell, Sweep  # noqa: E402
from flows import cells, checks, outcome, progress, refusals  # noqa: E402
from flows.changes import Since  # noqa: E402
from flows.progress import Progress  # noqa: E402
from mlflow_tracking import arrange, parents  # noqa: E402
from mlflow_tracking.parents import Parent  # noqa: E402
from tasks import interruption, names  # noqa: E402


@form.left_empty
@flow(name="sweep", validate_parameters=True)
@refusals.told
def run_sweep(
    sweep: Annotated[str, form.name_or_file(configfile.preset_names(SWEEPS), "sweep")] = "demo",
    overrides: Annotated[dict[str, Any] | None, form.empty("object")] = None,
    parallel: Annotated[int | None, Field(ge=1), form.empty("integer", minimum=1)] = None,
    pool: Annotated[str | None, form.empty("string")] = None,
    fresh: bool = False,
    retry_failed: bool = False,
) -> str:
    """Every run of a sweep, compared; a run that fails does not stop the rest. Returns the sweep's folder.

    Args:
        sweep: A sweep of deployments/sweeps, or a YAML file on the worker.
        overrides: Settings for all runs by dotted key, for example {"rounds": 4}. Relative paths are relative to
            deployments/prefect.yaml.
        parallel: Runs side by side. Empty: one after the other here, all at once in a work pool.
        pool: Work pool that executes the runs, so that several machines share them. Empty: this process.
        fresh: Begin anew, also where the same sweep was run before. Otherwise what has finished is not repeated.
        retry_failed: Run again what failed before.
    """
    plan = sweeps.load(sweep, configfile.absolute_paths(overrides or {}, DEPLOYMENTS), PRESETS, SWEEPS)
    names.replace_generated(f"sweep {plan.name}")
    flow_run = str(runtime.flow_run.id or "")
    refused = {} if pool else checks.of_sweep(plan, known_finished(plan, fresh))  # data are where the workers are
    for config in checks.stores_of(plan):
        checks.tracking(config)
    folder = SweepFolder.choose(home.sweeps(), plan, fresh, flow_run)
    if folder.parent and not parents.there(Parent(**folder.parent)):  # deleted in MLflow: so is what was under it
        folder = SweepFolder.choose(home.sweeps(), plan, fresh=True)
    since: Since | None = None
    with lock.held(folder.path, f"sweep {plan.name} in {folder.path}", "wait for it, or begin another with --fresh"):
        if nothing_to_do(plan, folder, retry_failed, refused):
            report_known(progress.current(), plan, folder)
        else:
            folder.begin(plan, flow_run, retry_failed)
            folder.refuse(refused)
            parent = open_parent(plan, folder)
            with interruption.noted(), parents.closing(parent):
                execute(plan, folder, parent, parallel, pool)
                since = outcome.publish(plan, folder, parent)
    if not folder.having("finished"):
        failed = folder.having("failed")[0]
        raise FedloraError(f"sweep {plan.name}: no run finished; the first, {failed.label}: {failed.reason}")
    return ended(folder, since)


def ended(folder: SweepFolder, since: Since | None) -> str:
    """The folder, as the result of a state that says what changed since the last execution: `Regression`, of type
    Completed, where a score is worse beyond noise. Who calls the flow gets the folder."""
    name = REGRESSION if since and since.regression else None
    return cast(str, Completed(name=name, message=since.line, data=str(folder.path))) if since else str(folder.path)


def known_finished(plan: Sweep, fresh: bool) -> set[str]:
    """Digests of the runs that finished in the latest execution of a sweep."""
    latest = None if fresh else SweepFolder.latest(home.sweeps(), plan)
    return {str(state.digest) for state in latest.having("finished")} if latest else set()


def nothing_to_do(plan: Sweep, folder: SweepFolder, retry_failed: bool, refused: Mapping[str, str]) -> bool:
    """Whether this execution came to its end before, with the same runs, and all it left is there.

    Then nothing is touched, neither here nor in MLflow: it stays the sweep that ended when it did, with its duration.
    """
    if folder.parent is None or not parents.is_closed(Parent(**folder.parent)) or not outcome.is_whole(plan, folder):
        return False
    again = folder.copy()
    again.begin(plan, "", retry_failed)
    again.refuse(refused)
    take_over(again, parents.finished(Parent(**folder.parent)))
    return again.cells == folder.cells and not again.having("waiting")


def take_over(folder: SweepFolder, done: Mapping[str, str]) -> None:
    """Note what has finished in MLflow (run by digest), and that the rest has not: somebody may have deleted it."""
    for state in folder.cells:
        if state.digest and state.digest in done:
            folder.mark(state.digest, "finished", run=done[state.digest])
        elif state.digest and state.status == "finished":
            folder.mark(state.digest, "waiting")


def open_parent(plan: Sweep, folder: SweepFolder) -> Parent:
    """The sweep's run in MLflow: a new one, or that of the execution that is continued, and what finished under it."""
    if folder.parent:
        parent = Parent(**folder.parent)
        parents.resume(parent)
    else:
        tracking = plan.cells[0].config.tracking
        parent = parents.start(tracking, plan.name, folder.instance, outcome.description(plan, folder))
        folder.parent = vars(parent)
    criterion, fixed = objective.score_of(plan.cells[0].config), {"base": Path(plan.base).name, **plan.common}
    arrange.begun(parent, folder.instance, criterion, fixed, swept(plan))
    take_over(folder, parents.finished(parent))
    folder.save(plan)
    return parent


def swept(plan: Sweep) -> dict[str, list[Any]]:
    """The values of each setting that varies."""
    return {key: [cell.settings[key] for cell in plan.cells] for key in plan.varied}


def execute(plan: Sweep, folder: SweepFolder, parent: Parent, parallel: int | None, pool: str | None) -> None:
    """Run the cells that wait, here or in a work pool, noting each as it ends."""
    told = progress.current()
    waiting = {state.digest for state in folder.having("waiting")}
    todo = [cell for cell in plan.cells if cell.digest in waiting]
    report_known(told, plan, folder)

    def call(cell: Cell) -> dict[str, Any]:
        return cells.parameters(cell, plan.base, folder, parent)

    if pool:
        ended = cells.handed_over(todo, call, pool, parallel, folder.instance, told)
    else:
        ended = cells.run_here(todo, call, parallel or 1)
    for cell, trouble in ended:
        note(plan, folder, parent, cell, trouble, told)


def report_known(told: Progress, plan: Sweep, folder: SweepFolder) -> None:
    """Say what will not be run, and why."""
    done, failed = folder.having("finished"), folder.having("failed")
    if done:
        told.say(
            f"{len(done)} of {counted(len(plan.cells), 'run')} had finished before, not repeated (--fresh begins anew)"
        )
    for state in failed:
        how = "cannot begin" if state.refused else "failed before and is not tried again (--retry-failed)"
        told.say(f"{state.label} {how}: {state.reason}")
    for state in folder.having("skipped"):
        told.say(f"{state.label} is left out: {state.reason}")


def note(plan: Sweep, folder: SweepFolder, parent: Parent, cell: Cell, trouble: str | None, told: Progress) -> None:
    """Write down how a cell ended: what MLflow holds of it decides."""
    run = parents.finished(parent, cell.digest).get(cell.digest)
    if run:
        folder.mark(cell.digest, "finished", run=run)
        told.say(f"{cell.label}: finished, {len(folder.having('waiting'))} to go")
    else:
        reason = trouble or f"it ended well, but no finished run of it is in {parent.uri}; does its worker log there?"
        folder.mark(cell.digest, "failed", reason)
        told.say(f"{cell.label} failed: {reason}")
    folder.save(plan)
