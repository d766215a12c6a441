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
    FlowRunFilterTags,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, Log
from prefect.client.schemas.sorting import FlowRunSort, LogSort

from fedlora.errors import ConfigError, FedloraError
from tasks import names

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
        what: its id, its name, or the one it was created with; None: the run that a person asked for last.
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
        found = _asked_for(client)
    else:
        named = FlowRunFilter(name=FlowRunFilterName(any_=[what]))
        was_named = FlowRunFilter(tags=FlowRunFilterTags(all_=[names.former(what)]))
        found = _by_id(client, what) or _latest(client, named) or _latest(client, was_named)
    if not found:
        raise ConfigError(f"no flow run '{what}'" if what else "no flow run was asked for yet")
    return found[0]


def _asked_for(client: SyncPrefectClient) -> list[FlowRun]:
    """The last that a person asked for: neither a run of a sweep nor what a schedule planned or ran."""
    alone = FlowRunFilter(
        parent_task_run_id=FlowRunFilterParentTaskRunId(is_null_=True),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
    )
    offset = 0
    while page := _latest(client, alone, _PAGE, offset):
        found = [run for run in page if run.state and not run.auto_scheduled]
        if found:
            return found
        offset += _PAGE
    return []


def _latest(client: SyncPrefectClient, wanted: FlowRunFilter, limit: int = 1, offset: int = 0) -> list[FlowRun]:
    order = FlowRunSort.EXPECTED_START_TIME_DESC
    return client.read_flow_runs(flow_run_filter=wanted, sort=order, limit=limit, offset=offset)


def _by_id(client: SyncPrefectClient, what: str) -> list[FlowRun]:
    from prefect.exceptions import ObjectNotFound

    try:
        return [client.read_flow_run(UUID(what))]
    except (ValueError, ObjectNotFound):
        return []
