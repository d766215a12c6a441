"""Ctrl-C and SIGTERM: Prefect calls such a run "Crashed"; a person who stopped it expects "Cancelled"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException, TerminationSignal
from prefect.states import Cancelled

from fedlora.training import workers

_interrupted: list[str] = []
_stopping = False
_SIGNALS = (TerminationSignal.__name__, KeyboardInterrupt.__name__)


def is_one(error: BaseException) -> bool:
    """Whether `error` is somebody stopping a run rather than something going wrong.

    A signal that arrives in pydantic's compiled code comes out as an error of pydantic's, with its name in the text.
    """
    return _stopping or not isinstance(error, Exception) or any(name in str(error) for name in _SIGNALS)


def stop_all() -> None:
    """Stop the runs of this process that go on in other threads: Ctrl-C reaches the main one only."""
    global _stopping
    _stopping = True
    workers.close_all()


def note(error: BaseException) -> None:
    """Remember the flow run under way if `error` is somebody stopping it."""
    if is_one(error) and not isinstance(error, SystemExit | GeneratorExit) and runtime.flow_run.id:
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
    global _stopping
    try:
        yield
    except BaseException as error:
        if not is_one(error):
            raise
        _stopping = False
        with get_client(sync_client=True) as client:
            while _interrupted:
                try:
                    client.set_flow_run_state(
                        UUID(_interrupted.pop()), Cancelled(message="Stopped by the user."), force=True
                    )
                except PrefectException:
                    continue
        if isinstance(error, Exception):
            raise KeyboardInterrupt from error
        raise
