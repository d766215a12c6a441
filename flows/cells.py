"""The cells of a sweep being run: in this process, one after the other or side by side, or in a work pool."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack
from contextvars import copy_context
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.logging import get_run_logger

from deployments.shipped import PRESETS
from fedlora.config import configfile
from fedlora.errors import FedloraError, counted, first_line
from fedlora.sweep.folder import SweepFolder
from fedlora.sweep.plan import Cell
from fedlora.training import workers
from flows import handover
from flows.federated import connected, federated
from flows.progress import Progress
from mlflow_tracking.parents import Parent
from tasks import interruption

Ended = tuple[Cell, str | None]
"""A cell, and what went wrong with it."""
Call = Callable[[Cell], dict[str, Any]]
"""The parameters of the flow `federated` for a cell."""


def run_folder(folder: SweepFolder, cell: Cell) -> Path:
    """Where a cell's run is kept, below the folder of runs: the same at every attempt, so that what it has done is not
    done again."""
    words = re.sub(r"[^\w.=-]+", "-", cell.label).strip("-")[:60]
    return Path(folder.instance) / f"{words}-{cell.digest[:8]}"


def parameters(cell: Cell, base: str, folder: SweepFolder, parent: Parent) -> dict[str, Any]:
    """What the flow `federated` is called with for a cell, here or on any other machine."""
    named = base in configfile.preset_names(PRESETS)
    changes = cell.changes if named else configfile.flatten(cell.config.model_dump(mode="json"))  # a file is here only
    return {
        "preset": base if named else "demo",
        "overrides": {**changes, "name": cell.name, "tracking.uri": parent.uri},
        "run_dir": str(run_folder(folder, cell)),
        "mlflow_parent": parent.run,
    }


def run_here(todo: Sequence[Cell], call: Call, parallel: int) -> Iterator[Ended]:
    """Run cells in this process, `parallel` of them side by side; all share the same worker slots.

    Args:
        todo: the cells.
        call: the parameters of the flow `federated` for a cell.
        parallel: how many at once.
    """

    def one(cell: Cell) -> Ended:
        return cell, _trouble(cell, call(cell))

    with ExitStack() as stack:
        runners = {cell.config.runner.model_dump_json(): cell.config.runner for cell in todo}
        for runner in runners.values():  # kept from one cell to the next, with the models in the workers
            stack.enter_context(workers.open_pool(runner))
            stack.enter_context(connected(runner))
        if parallel == 1:
            yield from map(one, todo)
        else:
            yield from _side_by_side(todo, one, parallel)


def _trouble(cell: Cell, given: dict[str, Any]) -> str | None:
    """Run one cell; what went wrong, or None. One bad cell never loses the rest."""
    try:
        federated.with_options(flow_run_name=cell.name)(**given)
    except FedloraError as error:
        return str(error)
    except Exception as error:
        get_run_logger().exception("%s failed", cell.label)
        return f"{type(error).__name__}: {first_line(error)} (the flow run's log in Prefect has the traceback)"
    return None


def _side_by_side(todo: Sequence[Cell], one: Callable[[Cell], Ended], parallel: int) -> Iterator[Ended]:
    threads = ThreadPoolExecutor(parallel, thread_name_prefix="cell")
    pending = {threads.submit(copy_context().run, one, cell) for cell in todo}
    try:
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BaseException:  # Ctrl-C reaches this thread only: the others must be told
        threads.shutdown(wait=False, cancel_futures=True)
        interruption.stop_all()
        raise
    finally:
        threads.shutdown()


def handed_over(
    todo: Sequence[Cell], call: Call, pool: str, at_once: int | None, owner: str, told: Progress
) -> Iterator[Ended]:
    """Have cells executed by the workers of a pool, at most `at_once` of them on their way.

    Args:
        todo: the cells.
        call: the parameters of the flow `federated` for a cell.
        pool: a work pool that has a deployment of it.
        at_once: empty: all.
        owner: the sweep's execution: a flow run of it that is on its way is not started twice.
        told: hears when nobody works.
    """
    post = handover.Post.at(pool, owner, told)
    told.say(f"{counted(len(todo), 'run')} for {post.deployment} in work pool '{pool}'")
    waiting = list(todo)
    under_way: dict[UUID, Cell] = {}
    try:
        while waiting or under_way:
            while waiting and (at_once is None or len(under_way) < at_once):
                cell = waiting.pop(0)
                under_way[post.send(cell.digest, cell.name, call(cell))] = cell
            for flow_run, trouble in post.ended(under_way):
                yield under_way.pop(flow_run), trouble
    except BaseException:
        post.cancel(under_way)
        raise
