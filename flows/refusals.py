"""How a flow run ends that a person must mend: its state's message is the one line, and no traceback is logged.

Also: what Prefect logs of every single task is left out, so that a log that is watched tells of the run.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

from prefect.logging import get_run_logger
from prefect.states import Failed

from fedlora.errors import FedloraError

P = ParamSpec("P")
T = TypeVar("T")

_FLOW_RUNS, _TASK_RUNS, _ENGINE = (f"prefect.{name}" for name in ("flow_runs", "task_runs", "engine"))


def told(flow: Callable[P, T]) -> Callable[P, T]:
    """A flow whose errors of ours become the message of its state. Who calls the flow still gets them raised."""

    @wraps(flow)
    def telling(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return flow(*args, **kwargs)
        except FedloraError as error:
            get_run_logger().error("%s", error)
            return cast(T, Failed(message=str(error), data=error))

    # Prefect makes the form of a deployment from these, and would look for names in this module.
    found = inspect.signature(flow, eval_str=True)
    telling.__signature__ = found  # type: ignore[attr-defined]
    telling.__annotations__ = {name: parameter.annotation for name, parameter in found.parameters.items()}
    telling.__annotations__["return"] = found.return_annotation
    return telling


class _Quiet(logging.Filter):
    """Keeps the tracebacks of what a person must mend out of the log, and the end of every task that went well."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], FedloraError):
            record.exc_info = None
            return record.name == _TASK_RUNS  # the other two say that the flow's own error was not expected
        return not (record.name == _TASK_RUNS and str(record.msg).startswith("Finished in state Completed"))


def _install() -> None:
    quiet: Any = _Quiet()
    for name in (_FLOW_RUNS, _TASK_RUNS, _ENGINE):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Quiet) for each in logger.filters):
            logger.addFilter(quiet)


_install()
