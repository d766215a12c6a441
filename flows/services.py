"""A Prefect server, an MLflow server and a worker on this machine: `fedlora up`, `fedlora down` and what runs now.

They listen on the loopback interface only, since neither server asks who is calling. Databases, artifacts and logs lie
under `fedlora.home` and outlive the servers: the next `up` continues with them.

**Artifacts.** The MLflow server hands clients an absolute folder as artifact root, so that a client on this machine
writes there itself instead of sending every file through the server. Adapters are then copied once, the server stays
free for the UI, and an experiment first made through the server can still be written to directly after `down`, which
one with the proxied root `mlflow-artifacts:/` cannot. The proxy stays on beside it, over the same folder, for a client
that asks for it. Metrics go through the server, so that the SQLite file has one writer.
"""

from __future__ import annotations

import base64
import fcntl
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fedlora import home
from flows.environment import Process, Services, defaults, is_alive, recorded_services
from flows.ports import check_ports, loopback
from flows.processes import ServiceError, ending, log_file, spawn, stop, stop_children

Report = Callable[[str], None]

POOL = "cpu-workers"
DEPLOYMENT = "custom"
SOURCE = Path(__file__).resolve().parent.parent
ENTRYPOINT = "flows/federated.py:federated"

TITLES = {"prefect": "Prefect server", "mlflow": "MLflow server", "worker": "worker"}
NOBODY: Process = (0, 0.0)
PATIENCE = 120.0
"""Seconds until a server that does not answer is given up; the first start migrates its database."""


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


def up(
    prefect_port: int = 4200,
    mlflow_port: int = 5000,
    host: str = "127.0.0.1",
    report: Report = print,
    *,
    source: Path = SOURCE,
) -> Services:
    """Start what does not run yet of Prefect server, MLflow server and worker, and return when all of them answer.

    `source` is the folder in which the worker finds `flows/federated.py`. If anything fails, what this call started is
    stopped again.

    Raises:
        ConfigError: `host` is not loopback, or a port is invalid, in use or given twice.
        ServiceError: a process died or did not answer within two minutes; its last log lines follow the first line.
    """
    host = loopback(host)
    with _alone():
        before = recorded_services() or Services("", "", {})
        alive = before.alive()
        if alive.keys() == TITLES.keys():
            report("already running (`fedlora down` stops it):")
            _wait(before, ("prefect", "mlflow"), time.monotonic() + PATIENCE, report)
        else:
            stop(_without(before.processes, alive))  # children that outlived them
            wanted = {"prefect": prefect_port, "mlflow": mlflow_port}
            check_ports(host, {name: port for name, port in wanted.items() if name not in alive})
            _check_source(source)
            prefect_url = before.prefect_url if "prefect" in alive else f"http://{host}:{prefect_port}/api"
            mlflow_url = before.mlflow_url if "mlflow" in alive else f"http://{host}:{mlflow_port}"
            before = _complete(before, Services(prefect_url, mlflow_url, alive), source, report)
        _announce(before, report)
        return before


def down(report: Report = print) -> None:
    """Stop the processes of `fedlora up`, with all they started, and forget them. Databases and artifacts stay.

    Raises:
        ServiceError: a process cannot be stopped, e.g. because another user started it.
    """
    with _alone():
        services = recorded_services()
        recorded = services.processes if services else {}
        processes = {name: recorded.get(name, NOBODY) for name in TITLES}  # without a record, the mark still tells
        servers = _without(processes, ("worker",))
        # The worker's flow runs first, then the worker, then the servers: each can still report to the next.
        stop_children(processes["worker"])
        stopped = [stop(_without(processes, servers)), stop(servers)]
        home.services_file().unlink(missing_ok=True)
    if any(stopped):
        report(f"stopped the servers and the worker; databases and artifacts stay in {home.home()}")
    else:
        report("nothing to stop: no server or worker of `fedlora up` is running")


def status() -> list[ServiceStatus]:
    """What the last `fedlora up` started and how it is doing; empty if there is nothing on record."""
    services = recorded_services()
    return [_status(name, services) for name in TITLES if name in services.processes] if services else []


def deploy(prefect_url: str, source: Path = SOURCE) -> None:
    """Register the deployment `federated/custom`, which runs `flows/federated.py` of the folder `source` in the pool.

    Prefect reads its settings when it is imported, so this happens in a process of its own.

    Raises:
        ServiceError: the flow cannot be imported or the server refuses it.
    """
    _check_source(source)
    deploying = _begin_deploying(prefect_url, source)
    try:
        _finish_deploying(deploying, time.monotonic() + PATIENCE)
    finally:
        deploying.kill()


def _complete(before: Services, services: Services, source: Path, report: Report) -> Services:
    """Add to `services` the processes it lacks; on any failure go back to what `before` still has running."""
    moved = (services.prefect_url, services.mlflow_url) != (before.prefect_url, before.mlflow_url)
    if moved and "worker" in services.processes:
        stop({"worker": services.processes.pop("worker")})  # it knows the old addresses
    kept = dict(services.processes)
    try:
        _start(services, source, report)
    except BaseException:  # Ctrl-C too
        stop(_without(services.processes, kept))
        _record(before)
        raise
    return services


def _start(services: Services, source: Path, report: Report) -> None:
    """Start what is missing in `services.processes`; each is on record as soon as it exists."""
    environ = _environment(services)
    commands = _commands(services)
    deadline = time.monotonic() + PATIENCE

    def launch(*names: str) -> None:
        for name in names:
            if name not in services.processes:
                services.processes[name] = spawn(name, commands[name], environ[name])
                _record(services)

    missing = [title for name, title in TITLES.items() if name not in services.processes]
    report(f"starting the {_listing(missing)} (logs in {home.logs()})")
    launch("prefect", "mlflow")
    _wait(services, ("prefect", "mlflow"), deadline, report)
    _create_pool(services.prefect_url)
    launch("worker")
    deploying = _begin_deploying(services.prefect_url, source)
    try:
        _wait(services, ("worker",), deadline, report)
        _finish_deploying(deploying, deadline)
    finally:
        deploying.kill()
        deploying.communicate()


def _commands(services: Services) -> dict[str, list[str]]:
    prefect, mlflow = httpx.URL(services.prefect_url), httpx.URL(services.mlflow_url)
    module = [sys.executable, "-m"]
    called = f"worker-{socket.gethostname()}"
    return {
        "prefect": [*module, "prefect", "server", "start", "--host", prefect.host, "--port", str(prefect.port)],
        # One server process: requests run in its threads, and SQLite has one writer in any case.
        "mlflow": [*module, "mlflow", "server", "--host", mlflow.host, "--port", str(mlflow.port), "--workers", "1"],
        "worker": [*module, "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", called],
    }


def _environment(services: Services) -> dict[str, dict[str, str]]:
    """The environment of each process. Stores go here and not on the command line, which every user can read."""
    common = {
        **defaults(),
        **os.environ,
        "FEDLORA_HOME": str(home.home()),
        "PREFECT_API_URL": services.prefect_url,
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",  # their console is a log file
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"])),
    }
    common["no_proxy"] = common["NO_PROXY"]
    prefect = {"PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false", **_writable_ui_folder(), **common}
    mlflow = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{home.mlflow_database()}",
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": str(home.mlflow_artifacts()),
        "MLFLOW_ARTIFACTS_DESTINATION": str(home.mlflow_artifacts()),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # jobs of LLM evaluation: more processes, unused here
        **common,
    }
    mlflow.pop("MLFLOW_TRACKING_URI", None)
    worker = {
        "MLFLOW_TRACKING_URI": services.mlflow_url,
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # by default a run waits up to ten seconds to be picked up
        **common,
    }
    return {"prefect": prefect, "mlflow": mlflow, "worker": worker}


def _writable_ui_folder() -> dict[str, str]:
    """Prefect copies its UI into its own package; where that is read-only, the copy goes under our home."""
    package = importlib.util.find_spec("prefect")
    if package and package.origin and os.access(Path(package.origin).parent / "server", os.W_OK):
        return {}
    return {"PREFECT_UI_STATIC_DIRECTORY": str(home.home() / "prefect-ui")}


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
            return _call("GET", f"{services.mlflow_url}/health").is_success
        if name == "prefect":
            return _call("GET", f"{services.prefect_url}/health").is_success
        workers = (
            _call("POST", f"{services.prefect_url}/work_pools/{POOL}/workers/filter", {}).raise_for_status().json()
        )
        return any(worker["status"] == "ONLINE" for worker in workers)
    except httpx.HTTPError:
        return False


def _call(method: str, url: str, body: Any = None) -> httpx.Response:
    """One request to a server of ours, past any proxy, with Prefect's basic authentication if the user has set it."""
    secret = os.environ.get("PREFECT_API_AUTH_STRING")
    headers = {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"} if secret else {}
    return httpx.request(method, url, json=body, headers=headers, timeout=2.0, trust_env=False)


def _create_pool(prefect_url: str) -> None:
    """Make the pool before both the worker and the deployment ask for it. The worker brings its job template."""
    try:
        answer = _call("POST", f"{prefect_url}/work_pools/", {"name": POOL, "type": "process"})
        if answer.status_code != httpx.codes.CONFLICT:  # there from an earlier `up`
            answer.raise_for_status()
    except httpx.HTTPError as error:
        raise ServiceError(
            f"the Prefect server at {prefect_url} did not create the work pool {POOL}: {error}"
        ) from error


def _check_source(source: Path) -> None:
    file = source / ENTRYPOINT.partition(":")[0]
    if not file.is_file():
        raise ServiceError(f"{file}, the flow that the worker would run, does not exist: is the installation complete?")


def _begin_deploying(prefect_url: str, source: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from flows.services import _register; _register(sys.argv[1])", str(source)],
        env={**defaults(), **os.environ, "PREFECT_API_URL": prefect_url, "NO_PROXY": "127.0.0.1,localhost"},
        cwd=SOURCE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _finish_deploying(process: subprocess.Popen[str], deadline: float) -> None:
    what = f"cannot register {ENTRYPOINT} as a deployment"
    try:
        output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"{what}: Prefect did not finish within {PATIENCE:.0f} s") from error
    if process.returncode:
        raise ServiceError(f"{what}:\n{ending(output)}")


def _register(source: str) -> None:
    """The body of `deploy`, in a process whose `PREFECT_API_URL` names the server."""
    from prefect import Flow
    from prefect.flows import load_flow_from_entrypoint
    from prefect.runner.storage import LocalStorage

    # `from_source` alone would register a placeholder for a flow that cannot be imported, and the error come at night.
    load_flow_from_entrypoint(str(Path(source, ENTRYPOINT)), use_placeholder_flow=False)
    flow: Any = Flow.from_source(LocalStorage(source), ENTRYPOINT)
    flow.deploy(
        name=DEPLOYMENT, work_pool_name=POOL, build=False, push=False, print_next_steps=False, ignore_warnings=True
    )


def _status(name: str, services: Services) -> ServiceStatus:
    state = "stopped"
    if is_alive(services.processes[name]):
        state = "running" if _answers(name, services) else "not answering"
    urls = {"prefect": services.prefect_url.removesuffix("/api"), "mlflow": services.mlflow_url}
    return ServiceStatus(name, state, urls.get(name, ""), services.processes[name][0], log_file(name))


def _announce(services: Services, report: Report) -> None:
    report(f"Prefect  {services.prefect_url.removesuffix('/api')}")
    report(f"MLflow   {services.mlflow_url}")
    report(f"worker   pool {POOL}, deployment federated/{DEPLOYMENT}")
    for name, ours in {"PREFECT_API_URL": services.prefect_url, "MLFLOW_TRACKING_URI": services.mlflow_url}.items():
        if os.environ.get(name, ours).rstrip("/") != ours:
            report(f"note: {name} is set in your environment and wins over the server above; unset it to use that")


def _without(processes: dict[str, Process], names: Container[str]) -> dict[str, Process]:
    return {name: process for name, process in processes.items() if name not in names}


def _record(services: Services) -> None:
    """Write down what runs, or remove the record when nothing does."""
    alive = services.alive()
    if alive:
        Services(services.prefect_url, services.mlflow_url, alive).save()
    else:
        home.services_file().unlink(missing_ok=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Keep a second `up` or `down` out; the lock ends with this process, however it ends."""
    try:
        home.home().mkdir(parents=True, exist_ok=True)
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
