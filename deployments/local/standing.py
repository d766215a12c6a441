"""What is true now of servers, workers, pools and schedules, for `fedlora status`. Asks, and changes nothing.

Two kinds of facts: the processes that `fedlora up` recorded on this machine, and what the Prefect server in use says,
which is the one of `PREFECT_API_URL` if that is set. Imports neither Prefect nor MLflow, so that it is quick.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import httpx

from deployments.local import launch, planning
from deployments.local.asking import answers, ask, client_of
from deployments.local.environment import Services, is_alive, recorded_services
from deployments.local.processes import ending, log_file
from deployments.local.server_log import Failure, failures

_PATIENCE = 3.0
"""Seconds for one answer."""
_DEPLOYMENTS = 25
"""So many are asked for their next run."""


@dataclass(frozen=True)
class Server:
    """Something that should run: a process of `fedlora up`, or a server that the environment names."""

    name: str
    """`prefect`, `mlflow`, `worker` or `gpu-worker`."""
    state: str
    """`running`, `stopped`, `does not answer` or `wants a password`."""
    place: str
    """Page of a server, pool of a worker."""
    remark: str = ""
    log: Path | None = None
    """Of a process on this machine."""

    @property
    def title(self) -> str:
        """`Prefect`, `MLflow`, `worker` or `GPU worker`."""
        return launch.TITLES.get(self.name, self.name).removesuffix(" server")

    @property
    def well(self) -> bool:
        """Whether it does what it is there for."""
        return self.state == "running"


@dataclass(frozen=True)
class Pool:
    """A work pool, as the Prefect server tells it."""

    name: str
    limit: int | None
    paused: bool
    workers: list[str]
    """Those that are there now."""
    running: int
    waiting: int
    """Runs whose time has come and that no worker has taken."""

    @property
    def stuck(self) -> bool:
        """Whether runs wait that nothing will take."""
        return bool(self.waiting) and (not self.workers or self.paused or self.limit == 0)


@dataclass(frozen=True)
class Next:
    """The next run of a deployment with an active schedule."""

    deployment: str
    at: datetime | None
    """None: the server has planned none."""


@dataclass(frozen=True)
class Standing:
    """All of it."""

    servers: list[Server]
    pools: list[Pool] = field(default_factory=list)
    schedules: list[Next] = field(default_factory=list)
    more_schedules: int = 0
    """Deployments with schedules that were not asked for."""
    failed: list[Failure] = field(default_factory=list)
    """Of the services in the Prefect server of `fedlora up`."""
    log: Path | None = None
    """Where that was read."""
    trouble: str = ""
    """Why the Prefect server could not be asked."""

    @property
    def well(self) -> bool:
        """Whether everything that should run does, and nothing waits for what is not there."""
        planned = all(each.at for each in self.schedules)
        up = bool(self.servers) and all(each.well for each in self.servers)
        return up and planned and not self.trouble and not any(pool.stuck for pool in self.pools)


def look() -> Standing:
    """Ask every process and server that is known here; seconds at most. Call `environment.prepare` first."""
    services = recorded_services()
    api = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    servers = sorted([*processes(), *_named(services, api)], key=lambda each: each.name in launch.WORKERS)
    log = log_file("prefect") if services and "prefect" in services.processes else None
    found = Standing(servers, failed=failures(log) if log else [], log=log)
    if not any(each.name == "prefect" and each.well and each.place == _page(api) for each in servers):
        return found
    try:
        with client_of(api, timeout=_PATIENCE) as client:
            schedules, more = _schedules(client)
            return replace(found, pools=list(_pools(client)), schedules=schedules, more_schedules=more)
    except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
        return replace(found, trouble=f"{api} did not tell more ({type(error).__name__}: {error})")


def processes() -> list[Server]:
    """What the last `fedlora up` started and how it is doing; empty if there is nothing on record."""
    services = recorded_services()
    return [_process(name, services) for name in launch.TITLES if name in services.processes] if services else []


def _process(name: str, services: Services) -> Server:
    process, log, url = services.processes[name], log_file(name), services.urls.get(name, "")
    place = _page(url) or f"pool {launch.WORKERS[name]}"
    if not is_alive(process):
        return Server(name, "stopped", place, f"last line: {ending(log, 1).strip()}", log)
    since = f"since {datetime.fromtimestamp(process[1]).astimezone():%a %d %b %H:%M}"
    return Server(name, _state(name, url) if url else "running", place, since, log)


def _named(services: Services | None, api: str) -> Iterator[Server]:
    """Servers besides those of `up`, which the environment names."""
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    ours = services.urls if services else {}
    recorded = services.processes if services else {}
    if api and (api != ours.get("prefect") or "prefect" not in recorded):
        yield Server("prefect", _state("prefect", api), _page(api), "PREFECT_API_URL names it")
    if tracking.startswith("http") and tracking != ours.get("mlflow"):
        yield Server("mlflow", _state("mlflow", tracking), tracking, "MLFLOW_TRACKING_URI names it")


def _page(api: str) -> str:
    return api.removesuffix("/api")


def _state(name: str, url: str) -> str:
    if not answers(url, None if name == "prefect" else ""):
        return "does not answer"
    if name == "mlflow":
        return "running"
    try:
        with client_of(url, timeout=_PATIENCE) as client:
            refused = client.post("work_pools/filter", json={"limit": 1}).status_code
        return "wants a password" if refused in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN) else "running"
    except httpx.HTTPError:
        return "does not answer"


def _pools(client: httpx.Client) -> Iterator[Pool]:
    now = datetime.now(UTC).isoformat()
    for pool in ask(client, "work_pools/filter"):
        name = pool["name"]
        there = [
            each["name"] for each in ask(client, f"work_pools/{name}/workers/filter") if each["status"] == "ONLINE"
        ]
        in_pool = {"work_pools": {"name": {"any_": [name]}}}
        due = {"state": {"type": {"any_": ["SCHEDULED"]}}, "next_scheduled_start_time": {"before_": now}}
        busy = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
        running, waiting = (ask(client, "flow_runs/count", {**in_pool, "flow_runs": runs}) for runs in (busy, due))
        yield Pool(name, pool["concurrency_limit"], pool["is_paused"], there, running, waiting)


def _schedules(client: httpx.Client) -> tuple[list[Next], int]:
    """The next run of each deployment that has an active schedule, soonest first; how many were not asked for."""
    active = planning.scheduled(ask(client, "deployments/filter", {"limit": 200}))
    chosen = active[:_DEPLOYMENTS]
    flows = {"flows": {"id": {"any_": sorted({each["flow_id"] for each in chosen})}}}
    names = {each["id"]: each["name"] for each in ask(client, "flows/filter", flows)}
    found = []
    for each in chosen:
        first = {**planning.planned_runs(each["id"]), "sort": "NEXT_SCHEDULED_START_TIME_ASC", "limit": 1}
        runs = ask(client, "flow_runs/filter", first)
        at = datetime.fromisoformat(runs[0]["next_scheduled_start_time"]) if runs else None
        found.append(Next(f"{names.get(each['flow_id'], '?')}/{each['name']}", at))
    return sorted(found, key=lambda run: (run.at is not None, run.at or 0, run.deployment)), len(active) - len(chosen)
