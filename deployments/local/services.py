"""A Prefect server, an MLflow server and workers on this machine: `fedlora up`, `fedlora down` and what runs now.

They listen on the loopback interface and ask nobody for a password, unless told otherwise: on an address that others
reach, both must ask who is calling (`authentication`), or nothing starts. Databases, artifacts and logs lie under
`fedlora.files.home` and outlive the servers: the next `up` continues with them.

**Artifacts.** The MLflow server hands clients an absolute folder as artifact root, so that a client on this machine
writes there itself instead of sending every file through the server. Adapters are then copied once, the server stays
free for the UI, and an experiment first made through the server can still be written to directly after `down`, which
one with the proxied root `mlflow-artifacts:/` cannot. The proxy stays on beside it, over the same folder, for a client
that asks for it. Metrics go through the server, so that the SQLite file has one writer.

**GPUs.** Where there are some, a second worker serves the pool `gpu-workers`, and the first one leaves them alone.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from deployments.local import authentication, database, gpus, launch, planning, ports, server_log, verifying
from deployments.local import registering as deploying
from deployments.local.database import Databases
from deployments.local.environment import Process, Services, is_alive, recorded_services
from deployments.local.prefect_api import CPU_POOL, GPU_POOL, call, ensure_pools, has_worker
from deployments.local.processes import ServiceError, ending, log_file, spawn, stop, stop_children
from deployments.local.registering import PATIENCE, SOURCE
from fedlora.errors import ConfigError
from fedlora.files import home

Report = Callable[[str], None]

TITLES = {
    "prefect": "Prefect server",
    "mlflow": "MLflow server",
    "worker": "worker",
    "gpu-worker": "GPU worker",
}
SERVERS = ("prefect", "mlflow")
CPU_RUNS = 2
"""Flow runs at a time in a new pool cpu-workers."""
NOBODY: Process = (0, 0.0)


@dataclass(frozen=True)
class ServiceStatus:
    """One of the processes of `fedlora up`, as it is now."""

    name: str
    state: str
    """`running`, `not answering` or `stopped`."""
    url: str
    """Page to open in a browser; empty for the worker."""
    pid: int
    log: Path


@dataclass(frozen=True)
class _Plan:
    """What an `up` is asked for."""

    source: Path
    databases: Databases
    limits: dict[str, int | None]
    names: list[str]
    """Of the processes that belong to it."""
    host: str
    authenticated: bool


def up(
    prefect_port: int = 4200,
    mlflow_port: int = 5000,
    host: str | None = None,
    report: Report = print,
    *,
    source: Path = SOURCE,
    database: str | None = None,
    cpu_runs: int | None = None,
    gpu_runs: int | None = None,
    authenticate: bool = False,
) -> Services:
    """Start what does not run yet of Prefect server, MLflow server and workers.

    Returns when all of them answer and the Prefect server plans the runs of our schedules.

    If anything fails, what this call started is stopped again.

    Args:
        prefect_port: Of the Prefect server.
        mlflow_port: Of the MLflow server.
        host: IPv4 address to listen on. None: where the servers already listen, or loopback. Any address but a loopback
            one needs what `deployments.local.authentication` lists in the environment.
        report: Told what happens, line by line.
        source: Folder with `deployments/prefect.yaml` and the flows that it names.
        database: PostgreSQL server for both, `postgresql://user@host:port`. None: what the variables of
            `deployments.local.database` say, or SQLite files.
        cpu_runs: Flow runs at a time in the pool cpu-workers. None: as it is; 2 at first.
        gpu_runs: The same for gpu-workers, 0 for no GPU worker. None: as it is; as many as there are GPUs at first.
        authenticate: Ask callers for a password on loopback too, as behind a proxy that others reach.

    Raises:
        ConfigError: others could reach a server that asks for no password, `host` is not an address of this machine, a
            port or number is invalid, in use or given twice, or the servers run otherwise (address, database).
        FedloraError: the database cannot be reached or made.
        ServiceError: a process died or did not answer within two minutes (its last log lines follow the first line), a
            server that should ask for a password does not, or the Prefect server does not plan runs.
    """
    reach = _reach(host, authenticate)
    with _alone():
        before = recorded_services() or Services("", "", {})
        alive = before.alive()
        plan = _plan(before, alive, source, database, {CPU_POOL: cpu_runs, GPU_POOL: gpu_runs}, reach)
        if alive.keys() >= set(plan.names):
            report("already running (`fedlora down` stops it):")
            _wait(before, SERVERS, time.monotonic() + PATIENCE, report)
            _limit(before, plan)
            _wait_for_plans(before, plan, report)
        else:
            stop(_without(before.processes, alive))  # children that outlived them
            wanted = {"prefect": prefect_port, "mlflow": mlflow_port}
            ports.check_ports(plan.host, {name: port for name, port in wanted.items() if name not in alive})
            at = f"http://{ports.reached_at(plan.host)}"
            prefect_url = before.prefect_url if "prefect" in alive else f"{at}:{prefect_port}/api"
            mlflow_url = before.mlflow_url if "mlflow" in alive else f"{at}:{mlflow_port}"
            _prepare(plan, report)
            now = Services(prefect_url, mlflow_url, alive, plan.databases.server, plan.host, plan.authenticated)
            before = _complete(before, now, plan, report)
        _announce(before, report)
        return before


def _reach(host: str | None, authenticate: bool) -> tuple[str, bool]:
    """Where the servers are to listen, and whether they ask who is calling. Checked before anything is touched."""
    at = ports.address(ports.LOOPBACK if host is None else host)
    asking = authenticate or not ports.is_loopback(at)
    if asking:
        authentication.check(at)
    return at if host is not None else "", asking


def _reach_now(before: Services, running: bool, all_there: bool, reach: tuple[str, bool]) -> tuple[str, bool]:
    """The same beside servers that run: what they do counts, and asking for something else is refused."""
    at, asking = reach
    if not running:
        return at or ports.LOOPBACK, asking
    if (at and at != before.host) or (asking and not before.authenticated):
        how = "ask for a password" if before.authenticated else "ask for no password"
        raise ConfigError(f"the servers already run on {before.host} and {how}; stop them first with `fedlora down`")
    if before.authenticated and not all_there:
        authentication.check(before.host)
    return before.host, before.authenticated


def _plan(
    before: Services,
    alive: dict[str, Process],
    source: Path,
    option: str | None,
    limits: dict[str, int | None],
    reach: tuple[str, bool],
) -> _Plan:
    """Check what can be checked before anything starts."""
    for pool, limit in limits.items():
        if limit is not None and limit < (pool == CPU_POOL):
            raise ConfigError(
                f"{limit} runs at a time in {pool}: expected a whole number from {1 - (pool == GPU_POOL)}"
            )
    asked = database.choose(option)
    running = any(name in alive for name in SERVERS)
    if running:
        if option and asked.server != before.database:
            raise ConfigError(
                f"the servers already run on {before.database or 'the databases they were started with'}, not on "
                f"{asked.server}; stop them first with `fedlora down`"
            )
        if before.database and not option:
            asked = database.choose(before.database)
    found = gpus.count() if limits[GPU_POOL] is None else limits[GPU_POOL]
    names = [name for name in TITLES if name != "gpu-worker" or found or name in alive]
    host, authenticated = _reach_now(before, running, alive.keys() >= set(names), reach)
    return _Plan(source, asked, limits, names, host, authenticated)


def _prepare(plan: _Plan, report: Report) -> None:
    deploying.check_source(plan.source)
    if plan.authenticated:
        authentication.prepare_files()
    created = database.prepare(plan.databases)
    if created:
        report(f"created the database{'s' if len(created) > 1 else ''} {_listing(created)}")


def _limit(services: Services, plan: _Plan) -> None:
    # A pool with a limit of zero would hold its runs back for ever, also for a worker that somebody starts elsewhere.
    limits = {pool: limit or None for pool, limit in plan.limits.items()}
    ensure_pools(services.prefect_url, limits, {CPU_POOL: CPU_RUNS, GPU_POOL: max(1, gpus.count())})


def down(report: Report = print) -> None:
    """Stop the processes of `fedlora up`, with all they started, and forget them. Databases and artifacts stay.

    Raises:
        ServiceError: a process cannot be stopped, e.g. because another user started it.
    """
    with _alone():
        services = recorded_services()
        recorded = services.processes if services else {}
        processes = {name: recorded.get(name, NOBODY) for name in TITLES}  # without a record, the mark still tells
        servers = _without(processes, launch.WORKERS)
        # The workers' flow runs first, then the workers, then the servers: each can still report to the next.
        for name in launch.WORKERS:
            stop_children(processes[name])
        stopped = [stop(_without(processes, servers)), stop(servers)]
        home.services_file().unlink(missing_ok=True)
    if any(stopped):
        report(f"stopped the servers and what worked for them; databases and artifacts stay in {home.home()}")
    else:
        report("nothing to stop: no server or worker of `fedlora up` is running")


def status() -> list[ServiceStatus]:
    """What the last `fedlora up` started and how it is doing; empty if there is nothing on record."""
    services = recorded_services()
    return [_status(name, services) for name in TITLES if name in services.processes] if services else []


def _complete(before: Services, services: Services, plan: _Plan, report: Report) -> Services:
    """Add to `services` the processes it lacks; on any failure go back to what `before` still has running."""
    now, then = ((each.prefect_url, each.mlflow_url, each.authenticated) for each in (services, before))
    workers = [name for name in launch.WORKERS if name in services.processes]
    if now != then and workers:
        stop({name: services.processes.pop(name) for name in workers})  # they know the old addresses and passwords
    kept = dict(services.processes)
    try:
        _start(services, plan, report)
    except BaseException:  # Ctrl-C too
        stop(_without(services.processes, kept))
        _record(before)
        raise
    return services


def _start(services: Services, plan: _Plan, report: Report) -> None:
    """Start what is missing in `services.processes`; each is on record as soon as it exists."""
    environ = launch.environments(services, plan.databases)
    commands = launch.commands(services)
    deadline = time.monotonic() + PATIENCE
    missing = [name for name in plan.names if name not in services.processes]

    def begin(names: Iterable[str]) -> None:
        for name in names:
            services.processes[name] = spawn(name, commands[name], environ[name])
            _record(services)

    report(f"starting the {_listing(TITLES[name] for name in missing)} (logs in {home.logs()})")
    begin(name for name in missing if name in SERVERS)
    _wait(services, SERVERS, deadline, report)
    if services.authenticated:
        verifying.verify(services)
    _limit(services, plan)
    workers = [name for name in missing if name in launch.WORKERS]
    begin(workers)
    registering = deploying.begin(services.prefect_url, plan.source)
    try:
        _wait(services, workers, deadline, report)
        deploying.finish(registering, time.monotonic() + deploying.PATIENCE)
    finally:
        deploying.end(registering)
    _wait_for_plans(services, plan, report)


def _wait_for_plans(services: Services, plan: _Plan, report: Report) -> None:
    """Return when the server plans the runs of our schedules; say which of its services fail besides."""
    log, process = log_file("prefect"), services.processes["prefect"]
    deadline = time.monotonic() + PATIENCE
    planning.wait(services.prefect_url, plan.source, log, deadline, report, lambda: is_alive(process))
    for failed in server_log.failures(log):
        if not failed.passing:
            report(f"warning: of the Prefect server, {planning.described(failed, log)}")


def _wait(services: Services, names: Iterable[str], deadline: float, report: Report) -> None:
    """Return when all of `names` answer; say every five seconds that we still wait."""
    silent = list(names)
    begun = told = time.monotonic()
    while silent := [name for name in silent if not _answers(name, services)]:
        for name in silent:
            if not is_alive(services.processes[name]):
                raise _failure(name, "stopped while starting")
        now = time.monotonic()
        if now > deadline:
            raise _failure(silent[0], f"did not answer within {PATIENCE:.0f} s")
        if now - told >= 5:
            told = now
            report(f"waiting for the {_listing(TITLES[name] for name in silent)} ({now - begun:.0f} s)")
        time.sleep(0.2)


def _failure(name: str, what: str) -> ServiceError:
    log = log_file(name)
    return ServiceError(f"the {TITLES[name]} {what}; the end of {log}:\n{ending(log)}")


def _answers(name: str, services: Services) -> bool:
    """Whether a server answers its health check, or the worker has told the server that it is there."""
    try:
        if name == "mlflow":
            return httpx.get(f"{services.mlflow_url}/health", timeout=2.0, trust_env=False).is_success
        if name == "prefect":
            return call("GET", f"{services.prefect_url}/health").is_success
        return has_worker(services.prefect_url, launch.WORKERS[name])
    except httpx.HTTPError:
        return False


def _status(name: str, services: Services) -> ServiceStatus:
    state = "stopped"
    if is_alive(services.processes[name]):
        state = "running" if _answers(name, services) else "not answering"
    urls = {"prefect": services.prefect_url.removesuffix("/api"), "mlflow": services.mlflow_url}
    return ServiceStatus(name, state, urls.get(name, ""), services.processes[name][0], log_file(name))


def _announce(services: Services, report: Report) -> None:
    page = services.prefect_url.removesuffix("/api")
    report(f"Prefect  {page}  (a form for every deployment: {page}/v2/deployments)")
    report(f"MLflow   {services.mlflow_url}")
    if services.database:
        report(f"database {services.database}")
    served = _listing(pool for name, pool in launch.WORKERS.items() if name in services.processes)
    idle = "" if "gpu-worker" in services.processes else f"; {GPU_POOL} has none (no GPU found, or --gpu-runs 0)"
    report(f"workers  {served}{idle}")
    report(f"to use them from a terminal: export PREFECT_API_URL={services.prefect_url}")
    for line in _who_may(services):
        report(line)
    for name, ours in {"PREFECT_API_URL": services.prefect_url, "MLFLOW_TRACKING_URI": services.mlflow_url}.items():
        if os.environ.get(name, ours).rstrip("/") != ours:
            report(f"note: {name} is set in your environment and wins over the server above; unset it to use that")


def _who_may(services: Services) -> list[str]:
    """Where others find the servers, what they need, and what does not protect them."""
    if not services.authenticated:
        return []
    api, tracking = (httpx.URL(url) for url in (services.prefect_url, services.mlflow_url))
    others = authentication.addresses() if services.host == authentication.EVERYWHERE else []
    logins = f"{authentication.PREFECT_CLIENT}, {authentication.USER} and {authentication.PASSWORD}"
    lines = [f"from other machines: http://{each}:{api.port} and http://{each}:{tracking.port}" for each in others]
    lines.append(f"both ask for user and password, in a terminal from {logins}")
    if ports.is_loopback(services.host):
        return [*lines, "for others, put a proxy with TLS in front: docs/deployments.md, 'TLS in front'"]
    warning = "warning: they speak plain HTTP, so the network between can read passwords and adapters"
    return [*lines, f"{warning}; put TLS in front: docs/deployments.md, 'TLS in front'"]


def _without(processes: dict[str, Process], names: Container[str]) -> dict[str, Process]:
    return {name: process for name, process in processes.items() if name not in names}


def _record(services: Services) -> None:
    """Write down what runs, or remove the record when nothing does."""
    alive = services.alive()
    if alive:
        replace(services, processes=alive).save()
    else:
        home.services_file().unlink(missing_ok=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Keep a second `up` or `down` out; the lock ends with this process, however it ends."""
    try:
        # A new one is this user's alone: Prefect keeps the key to its secret blocks in the same database as these.
        home.home().mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (home.home() / "services.lock").open("w")
    except OSError as error:
        raise ServiceError(
            f"cannot write in {home.home()}: {error.strerror or error}. FEDLORA_HOME chooses another folder."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ServiceError(
                "another `fedlora up` or `fedlora down` is at work; try again when it has finished"
            ) from error
        yield


def _listing(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
