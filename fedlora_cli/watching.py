"""Follows a flow run on a terminal by what the run itself says: a line per round, its results, why it failed.

`prefect deployment run … --watch` shows these lines too, among three events for every task.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from logging import ERROR
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterName,
    FlowRunFilterParentTaskRunId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, Log
from prefect.client.schemas.sorting import FlowRunSort, LogSort

from fedlora.errors import ConfigError, FedloraError

_OURS = "prefect.flow_runs"
"""The logger of flows; workers and tasks have others."""
_SETTING_OUT = (
    "Running ",
    "Executing deployment step",
    "Deployment step",
    "All deployment steps",
    "Beginning flow run",
)
_LAST = "Finished in state"
_POLL_S = 1.0
_STRAGGLERS_S = 10.0
"""How long the last lines of a run may take after its end; a run that crashed has no last line."""
_PAGE = 200


def follow(what: str | None, show: Callable[[str], None]) -> None:
    """Show what a flow run logs until it ends.

    Args:
        what: its id or name; None: the run that was asked for last.
        show: called with every line.

    Raises:
        ConfigError: there is no such flow run.
        FedloraError: it did not end well; the message of its state.
    """
    with get_client(sync_client=True) as client:
        run = _find(client, what)
        show(f"{run.name} ({run.id})")
        told: set[UUID] = set()
        held: list[str] = []
        until, complete = None, False
        while not complete:
            ended = run.state is not None and run.state.is_final()
            until = until or (time.monotonic() + _STRAGGLERS_S if ended else None)
            complete = until is not None and time.monotonic() > until
            for log in _new_logs(client, run.id, told):
                if log.message.startswith(_LAST):
                    complete = True
                elif log.level >= ERROR:
                    held.append(log.message)  # mostly what the state says too
                elif not log.message.startswith(_SETTING_OUT):
                    show(f"{log.timestamp.astimezone():%H:%M:%S}  {log.message}")
            if not complete:
                time.sleep(_POLL_S)
            run = client.read_flow_run(run.id)
    _end(run, held, show)


def _end(run: FlowRun, errors: Sequence[str], show: Callable[[str], None]) -> None:
    message = (run.state and run.state.message) or "no reason given"
    for error in errors:
        if error not in message:
            show(error)
    if run.state and not run.state.is_completed():
        raise FedloraError(f"{run.name} ended as {run.state.name}: {message}")


def _new_logs(client: SyncPrefectClient, run: UUID, told: set[UUID]) -> Iterator[Log]:
    """What the flow itself has logged and was not told yet; logs come in batches, and not always in order."""
    wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
    for offset in itertools.count(step=_PAGE):
        page = client.read_logs(wanted, limit=_PAGE, offset=offset, sort=LogSort.TIMESTAMP_ASC)
        yield from (log for log in page if log.name == _OURS and log.id not in told)
        told.update(log.id for log in page)
        if len(page) < _PAGE:
            return


def _find(client: SyncPrefectClient, what: str | None) -> FlowRun:
    if what is None:
        alone = FlowRunFilter(  # a run of a sweep is not what was asked for, nor are the nights that are planned
            parent_task_run_id=FlowRunFilterParentTaskRunId(is_null_=True),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
        )
        found = client.read_flow_runs(flow_run_filter=alone, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=20)
        found = [run for run in found if run.state and not (run.auto_scheduled and run.state.is_scheduled())]
    else:
        found = _by_id(client, what) or client.read_flow_runs(
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[what])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=1,
        )
    if not found:
        raise ConfigError(f"no flow run '{what}'" if what else "no flow run was asked for yet")
    return found[0]


def _by_id(client: SyncPrefectClient, what: str) -> list[FlowRun]:
    from prefect.exceptions import ObjectNotFound

    try:
        return [client.read_flow_run(UUID(what))]
    except (ValueError, ObjectNotFound):
        return []
