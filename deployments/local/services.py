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

import os
import time
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
from filelock import FileLock, Timeout

from deployments.local import authentication, launch, planning, ports, server_log, waiting
from deployments.local import registering as deploying
from deployments.local.asking import CPU_POOL, GPU_POOL, answers, ensure_pools, has_worker, verify
from deployments.local.environment import Process, Services, is_alive, recorded_services
from deployments.local.launch import SERVERS, TITLES, WORKERS
from deployments.local.processes import ServiceError, ending, log_file, spawn, stop, stop_children
from deployments.local.registering import PATIENCE, SOURCE
from deployments.local.waiting import Report, listing
from fedlora.errors import ConfigError
from fedlora.files import home

CPU_RUNS = 2
"""Flow runs at a time in a new pool cpu-workers."""
NOBODY: Process = (0, 0.0)


@dataclass(frozen=True)
class _Plan:
    """What an `up` is asked for."""

    wanted: Services
    """Addresses and what they ask callers for; `processes` are those that run already, and those that are added."""
    names: list[str]
    """Of the processes that belong to it."""
    source: Path
    limits: dict[str, int | None]
    report: Report


def up(
    prefect_port: int = 4200,
    mlflow_port: int = 5000,
    host: str | None = None,
    report: Report = print,
    *,
    source: Path = SOURCE,
    cpu_runs: int | None = None,
    gpu_runs: int | None = None,
    authenticate: bool = False,
) -> Services:
    """Start what does not run yet of Prefect server, MLflow server and workers.

    Returns when all of them answer and the Prefect server plans the runs of our schedules.

    If anything fails, what this call started is stopped again.

    Args:
        host: IPv4 address to listen on. None: where the servers already listen, or loopback. Any address but a loopback
            one needs what `deployments.local.authentication` lists in the environment.
        report: Told what happens, line by line.
        source: Folder with `deployments/prefect.yaml` and the flows that it names.
        cpu_runs: Flow runs at a time in the pool cpu-workers. None: as it is; 2 at first.
        gpu_runs: The same for gpu-workers, 0 for no GPU worker. None: as it is; as many as there are GPUs at first.
        authenticate: Ask callers for a password on loopback too, as behind a proxy that others reach.

    Raises:
        ConfigError: others could reach a server that asks for no password, `host` is not an address of this machine, a
            port or number is invalid, in use or given twice, the servers run at another address, or both were given one
            database.
        ServiceError: a process died or did not answer within two minutes (its last log lines follow the first line), a
            server that should ask for a password does not, or the Prefect server does not plan runs.
    """
    at = ports.address(ports.LOOPBACK if host is None else host)
    asking = authenticate or not ports.is_loopback(at)
    if asking:
        authentication.check(at)
    with _alone():
        before = recorded_services() or Services("", "", {})
        limits = {CPU_POOL: cpu_runs, GPU_POOL: gpu_runs}
        wanted = replace(before, processes=before.alive())
        names = _names(limits, wanted.processes)
        complete = wanted.processes.keys() >= set(names)
        reach = _reach(wanted, at if host is not None else "", asking, complete)
        wanted = replace(wanted, host=reach[0], authenticated=reach[1])
        if not complete:
            stop(_without(before.processes, wanted.processes))  # children that outlived them
            wanted = _addressed(wanted, {"prefect": prefect_port, "mlflow": mlflow_port})
        plan = _Plan(wanted, names, source, limits, report)
        if complete:
            report("already running (`fedlora down` stops it):")
            _wait(plan, SERVERS)
            _limit(plan)
            _wait_for_plans(plan)
        else:
            _prepare(plan)
            _complete(before, plan)
        _announce(wanted, report)
        return wanted


def _names(limits: dict[str, int | None], alive: Container[str]) -> list[str]:
    """The processes that belong to it, with a worker for GPUs where there are some or somebody says so."""
    for pool, limit in limits.items():
        least = int(pool == CPU_POOL)
        if limit is not None and limit < least:
            raise ConfigError(f"{limit} runs at a time in {pool}: expected a whole number from {least}")
    found = launch.gpus() if limits[GPU_POOL] is None else limits[GPU_POOL]
    return [name for name in TITLES if name != "gpu-worker" or found or name in alive]


def _reach(running: Services, at: str, asking: bool, complete: bool) -> tuple[str, bool]:
    """Where the servers are to listen, and whether they ask who is calling; the same holds for those that run."""
    if not running.processes.keys() & set(SERVERS):
        return at or ports.LOOPBACK, asking
    if (at and at != running.host) or (asking and not running.authenticated):
        how = "ask for a password" if running.authenticated else "ask for no password"
        raise ConfigError(f"the servers already run on {running.host} and {how}; stop them first with `fedlora down`")
    if running.authenticated and not complete:
        authentication.check(running.host)
    return running.host, running.authenticated


def _addressed(wanted: Services, given: dict[str, int]) -> Services:
    """With addresses for the servers that do not run yet, on ports that are free."""
    missing = {name: port for name, port in given.items() if name not in wanted.processes}
    ports.check_ports(wanted.host, missing)
    at = f"http://{ports.reached_at(wanted.host)}"
    urls = {"prefect": f"{at}:{given['prefect']}/api", "mlflow": f"{at}:{given['mlflow']}"}
    new = {f"{name}_url": urls[name] for name in missing}
    return replace(wanted, **new)  # type: ignore[arg-type]


def _prepare(plan: _Plan) -> None:
    launch.databases()  # one for both is refused before anything is made
    deploying.check_source(plan.source)
    if plan.wanted.authenticated:
        authentication.prepare_files()


def _limit(plan: _Plan) -> None:
    # A pool with a limit of zero would hold its runs back for ever, also for a worker that somebody starts elsewhere.
    limits = {pool: limit or None for pool, limit in plan.limits.items()}
    ensure_pools(plan.wanted.prefect_url, limits, {CPU_POOL: CPU_RUNS, GPU_POOL: max(1, launch.gpus())})


def down(report: Report = print) -> None:
    """Stop the processes of `fedlora up`, with all they started, and forget them. Databases and artifacts stay.

    Raises:
        ServiceError: a process cannot be stopped, e.g. because another user started it.
    """
    with _alone():
        services = recorded_services()
        recorded = services.processes if services else {}
        processes = {name: recorded.get(name, NOBODY) for name in TITLES}  # without a record, the mark still tells
        servers = _without(processes, WORKERS)
        # The workers' flow runs first, then the workers, then the servers: each can still report to the next.
        for name in WORKERS:
            stop_children(processes[name])
        stopped = [stop(_without(processes, servers)), stop(servers)]
        home.services_file().unlink(missing_ok=True)
    if any(stopped):
        report(f"stopped the servers and what worked for them; databases and artifacts stay in {home.home()}")
    else:
        report("nothing to stop: no server or worker of `fedlora up` is running")


def _complete(before: Services, plan: _Plan) -> None:
    """Start the processes that are missing; on any failure go back to what `before` still has running."""
    now, then = ((*each.urls.values(), each.authenticated) for each in (plan.wanted, before))
    processes = plan.wanted.processes
    if now != then:  # workers know the old addresses and passwords
        stop({name: processes.pop(name) for name in WORKERS if name in processes})
    kept = dict(processes)
    try:
        _start(plan)
    except BaseException:  # Ctrl-C too
        stop(_without(processes, kept))
        _record(before)
        raise


def _start(plan: _Plan) -> None:
    """Start what is missing; each process is on record as soon as it exists."""
    services = plan.wanted
    environ, commands = launch.environments(services), launch.commands(services)
    missing = [name for name in plan.names if name not in services.processes]
    workers = [name for name in missing if name in WORKERS]

    def begin(names: Iterable[str]) -> None:
        for name in names:
            services.processes[name] = spawn(name, commands[name], environ[name])
            _record(services)

    plan.report(f"starting the {listing(TITLES[name] for name in missing)} (logs in {home.logs()})")
    begin(name for name in missing if name in SERVERS)
    _wait(plan, SERVERS)
    if services.authenticated:
        verify(services)
    _limit(plan)
    begin(workers)
    deploying.deploy(services.prefect_url, plan.source)  # while the workers start
    _wait(plan, workers)
    _wait_for_plans(plan)


def _wait_for_plans(plan: _Plan) -> None:
    """Return when the server plans the runs of our schedules; say which of its services fail besides."""
    log, process = log_file("prefect"), plan.wanted.processes["prefect"]
    deadline = time.monotonic() + PATIENCE
    planning.wait(plan.wanted.prefect_url, plan.source, log, deadline, plan.report, lambda: is_alive(process))
    for failed in server_log.failures(log):
        if not failed.passing:
            plan.report(f"warning: of the Prefect server, {failed.told(log)}")


def _wait(plan: _Plan, names: Iterable[str]) -> None:
    """Return when all of `names` answer."""
    waited_for = list(names)

    def silent() -> list[str]:
        waited_for[:] = [name for name in waited_for if not _answers(name, plan.wanted)]
        for name in waited_for:
            if not is_alive(plan.wanted.processes[name]):
                raise _failure(name, "stopped while starting")
        return [TITLES[name] for name in waited_for]

    if waiting.for_all(silent, time.monotonic() + PATIENCE, plan.report):
        raise _failure(waited_for[0], f"did not answer within {PATIENCE:.0f} s")


def _failure(name: str, what: str) -> ServiceError:
    log = log_file(name)
    return ServiceError(f"the {TITLES[name]} {what}; the end of {log}:\n{ending(log)}")


def _answers(name: str, services: Services) -> bool:
    """Whether a server answers its health check, or the worker has told the server that it is there."""
    return has_worker(services.prefect_url, WORKERS[name]) if name in WORKERS else answers(services.urls[name])


def _announce(services: Services, report: Report) -> None:
    page = services.prefect_url.removesuffix("/api")
    report(f"Prefect  {page}  (a form for every deployment: {page}/v2/deployments)")
    report(f"MLflow   {services.mlflow_url}")
    served = listing(pool for name, pool in WORKERS.items() if name in services.processes)
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
        lock = FileLock(home.home() / "services.lock", timeout=0).acquire()
    except Timeout:
        raise ServiceError("another `fedlora up` or `fedlora down` is at work; try again when it has ended") from None
    except OSError as error:
        raise ServiceError(
            f"cannot write in {home.home()}: {error.strerror or error}. FEDLORA_HOME chooses another folder."
        ) from error
    with lock:
        yield
