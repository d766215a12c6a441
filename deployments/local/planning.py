"""Whether a Prefect server plans the runs of schedules, which it can fail to do while it answers and looks healthy."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from deployments.local import registering as deploying
from deployments.local import waiting
from deployments.local.asking import ask, ours
from deployments.local.processes import ServiceError
from deployments.local.server_log import Failure, failures

SERVICES = ("schedule_recent_deployments", "schedule_deployments", "services.scheduler", "scheduler")
"""The first plans what was registered in the last seconds, the second everything, once a minute."""
_SWITCHES = ("PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED", "PREFECT_API_SERVICES_SCHEDULER_ENABLED")


def scheduled(deployments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a server's deployments, as its API tells them, of which runs are to be planned."""
    return [each for each in deployments if not each["paused"] and any(one["active"] for one in each["schedules"])]


def planned_runs(deployment: str) -> dict[str, Any]:
    """The filter, for `flow_runs/…` of the API, of the runs of a deployment that are still to come."""
    return {
        "flow_runs": {
            "deployment_id": {"any_": [deployment]},
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "next_scheduled_start_time": {"after_": datetime.now(UTC).isoformat()},
        }
    }


def switched_off() -> str:
    """The variable by which a user has told the server not to plan at all; empty where none does."""
    off = (name for name in _SWITCHES if os.environ.get(name, "").lower() in ("0", "false", "no", "off"))
    return next(off, "")


def wait(
    prefect_url: str,
    source: Path,
    log: Path,
    deadline: float,
    report: Callable[[str], None],
    alive: Callable[[], bool],
) -> None:
    """Return when runs are planned of every deployment of `source` whose schedule is active on the server.

    Registering a deployment deletes its planned runs, so those that are found were planned by the server as it is now.

    Raises:
        ServiceError: the service that plans fails (its name, the error and the log's line follow), or the time is up.
    """
    wanted = {(each["name"], each["entrypoint"]) for each in deploying.declared(source) if each.get("schedules")}
    if not wanted:
        return
    if switched_off():
        report(f"note: {switched_off()} is set in your environment, so this server plans no runs of schedules")
        return
    begun = time.monotonic()

    def unplanned() -> list[str]:
        names = _unplanned(prefect_url, wanted)
        if names and (failed := _failure(log)) is not None:
            raise ServiceError(
                f"the Prefect server plans no runs of {', '.join(names)}: {failed.told(log)}. Packages other than "
                "the tested ones can be why: pip install -c constraints.txt puts those back"
            )
        if names and not alive():
            raise silent(names, "stopped before it had planned")
        return names

    def silent(names: list[str], what: str) -> ServiceError:
        return ServiceError(
            f"the Prefect server {what} runs of {', '.join(names)} within {time.monotonic() - begun:.0f} s, and does "
            f"not say why; its log: {log}"
        )

    if left := waiting.for_all(unplanned, deadline, report, "Prefect server to plan the runs of {}"):
        raise silent(left, "has planned no")


def _unplanned(prefect_url: str, wanted: set[tuple[str, str]]) -> list[str]:
    """Names of those of these deployments without a planned run; all of them if the server is too busy to say."""
    names = sorted({name for name, _ in wanted})
    try:
        with ours(prefect_url) as client:
            found = ask(client, "deployments/filter", {"deployments": {"name": {"any_": names}}})
            active = [each for each in scheduled(found) if (each["name"], each["entrypoint"] or "") in wanted]
            return [each["name"] for each in active if not ask(client, "flow_runs/count", planned_runs(each["id"]))]
    except httpx.HTTPError:
        return names


def _failure(log: Path) -> Failure | None:
    """The last failure of a service that plans, unless another attempt will do."""
    return next((each for each in reversed(failures(log)) if each.service in SERVICES and not each.passing), None)
