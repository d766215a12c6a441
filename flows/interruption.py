"""Ctrl-C and SIGTERM: Prefect calls such a run "Crashed"; a person who stopped it expects "Cancelled"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException, TerminationSignal
from prefect.states import Cancelled

_interrupted: list[str] = []


def note(error: BaseException) -> None:
    """Remember the flow run under way if `error` is somebody stopping it."""
    if isinstance(error, KeyboardInterrupt | TerminationSignal) and runtime.flow_run.id:
        _interrupted.append(str(runtime.flow_run.id))


@contextmanager
def noted() -> Iterator[None]:
    """Note what ends the flow run under way."""
    try:
        yield
    except BaseException as error:
        note(error)
        raise


@contextmanager
def marked() -> Iterator[None]:
    """Around a flow call: after an interruption, the flow runs that were under way are set to Cancelled."""
    try:
        yield
    except KeyboardInterrupt:
        with get_client(sync_client=True) as client:
            while _interrupted:
                try:
                    client.set_flow_run_state(
                        UUID(_interrupted.pop()), Cancelled(message="Stopped by the user."), force=True
                    )
                except PrefectException:
                    continue
        raise
