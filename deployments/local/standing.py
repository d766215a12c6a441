"""What is true now of servers, workers, pools and schedules, for `fedlora status`. Asks, and changes nothing.

Two kinds of facts: the processes that `fedlora up` recorded on this machine, and what the Prefect server in use says,
which is the one of `PREFECT_API_URL` if that is set. Imports neither Prefect nor MLflow, so that it is quick.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from deployments.local import environment, launch, planning
from deployments.local.authentication import PREFECT_CLIENT
from deployments.local.environment import Services, is_alive, recorded_services
from deployments.local.processes import ending, log_file
from deployments.local.server_log import Failure, failures
from fedlora.errors import FedloraError

_PATIENCE = 3.0
"""Seconds for one answer."""
_DEPLOYMENTS = 25
"""So many are asked for their next run."""


@dataclass(frozen=True)
class Server:
    """Something that should run: a process of `fedlora up`, or a server that the environment names."""

    name: str
    """`Prefect`, `MLflow`, `worker` or `GPU worker`."""
    state: str
    """`running`, `stopped`, `does not answer` or `wants a password`."""
    place: str
    """Page of a server, pool of a worker."""
    remark: str = ""
    log: Path | None = None
    """Of a process on this machine."""

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
    servers = [*_servers(services, api), *_workers(services)]
    log = log_file("prefect") if services and "prefect" in services.processes else None
    failed = failures(log) if log else []
    asked = next((each for each in servers if each.name == "Prefect" and each.well and each.place == _page(api)), None)
    if asked is None:
        return Standing(servers, failed=failed, log=log)
    try:
        with _client(api) as client:
            schedules, more = _schedules(client)
            return Standing(servers, list(_pools(client)), schedules, more, failed, log)
    except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
        trouble = f"{api} did not tell more ({type(error).__name__}: {error})"
        return Standing(servers, failed=failed, log=log, trouble=trouble)


def _page(api: str) -> str:
    return api.removesuffix("/api")


def _servers(services: Services | None, api: str) -> Iterator[Server]:
    """Those of `up`, and others that the environment names."""
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    ours = {"prefect": services.prefect_url, "mlflow": services.mlflow_url} if services else {}
    for name, url in ours.items():
        if services and name in services.processes:
            yield _process(name, services, url)
    if api and (api != ours.get("prefect") or "prefect" not in (services.processes if services else {})):
        yield Server("Prefect", _prefect_state(api), _page(api), "PREFECT_API_URL names it")
    if tracking.startswith("http") and tracking != ours.get("mlflow"):
        yield Server("MLflow", _mlflow_state(tracking), tracking, "MLFLOW_TRACKING_URI names it")


def _process(name: str, services: Services, url: str) -> Server:
    title, log = {"prefect": "Prefect", "mlflow": "MLflow"}[name], log_file(name)
    process = services.processes[name]
    if not is_alive(process):
        return Server(title, "stopped", _page(url), _last_words(log), log)
    state = _prefect_state(url) if name == "prefect" else _mlflow_state(url)
    return Server(title, state, _page(url), _since(process[1]), log)


def _workers(services: Services | None) -> Iterator[Server]:
    for name, pool in launch.WORKERS.items():
        if services and name in services.processes:
            process, log = services.processes[name], log_file(name)
            alive = is_alive(process)
            title = "worker" if name == "worker" else "GPU worker"
            remark = _since(process[1]) if alive else _last_words(log)
            yield Server(title, "running" if alive else "stopped", f"pool {pool}", remark, log)


def _since(started: float) -> str:
    return f"since {datetime.fromtimestamp(started).astimezone():%a %d %b %H:%M}"


def _last_words(log: Path) -> str:
    return f"last line: {ending(log, 1).strip()}"


def _client(url: str) -> httpx.Client:
    """As our other clients call this server, and with a key where the environment holds one."""
    client = environment.client_of(url)
    client.timeout, client.base_url = httpx.Timeout(_PATIENCE), httpx.URL(url)
    if (key := os.environ.get("PREFECT_API_KEY")) and not os.environ.get(PREFECT_CLIENT):
        client.headers["Authorization"] = f"Bearer {key}"
    return client


def _prefect_state(url: str) -> str:
    try:
        with _client(url) as client:
            client.get("/health").raise_for_status()
            refused = client.post("/work_pools/filter", json={"limit": 1}).status_code
        return "wants a password" if refused in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN) else "running"
    except (httpx.HTTPError, httpx.InvalidURL, OSError, FedloraError):
        return "does not answer"


def _mlflow_state(url: str) -> str:
    try:
        answer = httpx.get(f"{url}/health", timeout=_PATIENCE, trust_env=False)
        return "running" if answer.is_success else "does not answer"
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        return "does not answer"


def _ask(client: httpx.Client, path: str, body: dict[str, Any] | None = None) -> Any:
    return client.post(path, json=body or {}).raise_for_status().json()


def _pools(client: httpx.Client) -> Iterator[Pool]:
    now = datetime.now(UTC).isoformat()
    for pool in _ask(client, "/work_pools/filter"):
        name = pool["name"]
        there = [
            each["name"] for each in _ask(client, f"/work_pools/{name}/workers/filter") if each["status"] == "ONLINE"
        ]
        in_pool = {"work_pools": {"name": {"any_": [name]}}}
        due = {"state": {"type": {"any_": ["SCHEDULED"]}}, "next_scheduled_start_time": {"before_": now}}
        busy = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
        running, waiting = (_ask(client, "/flow_runs/count", {**in_pool, "flow_runs": runs}) for runs in (busy, due))
        yield Pool(name, pool["concurrency_limit"], pool["is_paused"], there, running, waiting)


def _schedules(client: httpx.Client) -> tuple[list[Next], int]:
    """The next run of each deployment that has an active schedule, soonest first; how many were not asked for."""
    active = planning.scheduled(_ask(client, "/deployments/filter", {"limit": 200}))
    chosen = active[:_DEPLOYMENTS]
    flows = {each.flow for each in chosen}
    names = {
        each["id"]: each["name"] for each in _ask(client, "/flows/filter", {"flows": {"id": {"any_": sorted(flows)}}})
    }
    found = []
    for each in chosen:
        first = {**planning.planned_runs(each.id), "sort": "NEXT_SCHEDULED_START_TIME_ASC", "limit": 1}
        runs = _ask(client, "/flow_runs/filter", first)
        at = datetime.fromisoformat(runs[0]["next_scheduled_start_time"]) if runs else None
        found.append(Next(f"{names.get(each.flow, '?')}/{each.name}", at))
    return sorted(found, key=lambda run: (run.at is not None, run.at or 0, run.deployment)), len(active) - len(chosen)
