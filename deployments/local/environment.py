"""Settings of Prefect, MLflow, Hugging Face and the thread libraries that must be in place *before* they are imported.

What the user has set always wins; the defaults keep everything under `fedlora.files.home` and off the network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from deployments.local import authentication
from fedlora.config import addresses
from fedlora.files import home
from fedlora.files.atomic import write_json

Process = tuple[int, float]
"""A process id with the time its process started, which tells it from a later process with the same id."""


@dataclass(frozen=True)
class Services:
    """Servers that `fedlora up` started: URLs, and for each process its id and start time."""

    prefect_url: str
    """Address of the Prefect API, as in `PREFECT_API_URL`: it ends in `/api`."""
    mlflow_url: str
    processes: dict[str, Process]
    """By name: `prefect`, `mlflow`, `worker`, `gpu-worker`."""
    host: str = "127.0.0.1"
    """The address that the servers listen on; the URLs hold one under which this machine reaches them."""
    authenticated: bool = False
    """Whether the servers ask who is calling: whatever is started beside them must do so too."""

    @property
    def urls(self) -> dict[str, str]:
        """Addresses of the servers by the name of their process."""
        return {"prefect": self.prefect_url, "mlflow": self.mlflow_url}

    def save(self) -> None:
        """Write the record whole or not at all: `down` relies on it."""
        write_json(home.services_file(), asdict(self))

    def alive(self) -> dict[str, Process]:
        """Those of the recorded processes that still run."""
        return {name: process for name, process in self.processes.items() if is_alive(process)}


def is_alive(process: Process) -> bool:
    """Whether exactly this process still runs: neither finished, nor replaced by a stranger with its id."""
    import psutil

    pid, started = process
    try:
        found = psutil.Process(pid)
        return bool(abs(found.create_time() - started) <= 1 and found.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, ValueError):
        return False


def recorded_services() -> Services | None:
    """What the last `fedlora up` wrote down, whether or not it still runs."""
    try:
        content = home.services_file().read_bytes()
    except OSError:
        return None
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Services).validate_json(content)
    except ValidationError:
        return None


def running_services() -> Services | None:
    """The servers of `fedlora up` if they are recorded and their processes still live."""
    services = recorded_services()
    return services if services and {"prefect", "mlflow"} <= services.alive().keys() else None


UTF8 = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
"""For a process whose output goes to a log file of ours: a sign that the terminal's encoding lacks must not end it."""


def defaults(console_level: str = "ERROR") -> dict[str, str]:
    """Environment variables that a process of ours gets unless the user has set them."""
    root = home.home()
    found = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": home.sqlite_url(home.prefect_database(), "aiosqlite"),
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(root / "prefect-results"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_CLIENT_MAX_RETRIES": "8",  # 2 + 4 + … + 256 s: a server that goes away for some minutes is waited for
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # a traceback for every heartbeat that finds no server
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; `automations` gives a silent run up after four
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": console_level,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # seconds, for four minutes: what is not taken waits in the run folder
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    if os.environ.get("PREFECT_API_DATABASE_CONNECTION_URL"):  # the older name of the same setting, which Prefect reads
        del found["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    return found


def of_child(prefect_url: str) -> dict[str, str]:
    """What a process of ours gets that talks to a Prefect server and writes into a log."""
    host = urlsplit(prefect_url).hostname or ""
    return {**defaults(), **os.environ, **addresses.direct(os.environ, host), **UTF8, "PREFECT_API_URL": prefect_url}


def of_server() -> dict[str, str]:
    """What a Prefect server of ours gets besides: leases of concurrency slots survive it.

    Otherwise the slots of a server that was killed, or of a run that died with its own server, would be taken for ever.
    """
    return {
        "PREFECT_HOME": str(home.home() / "prefect"),
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }


def prepare(console_level: str = "ERROR") -> None:
    """Fill in environment variables that are not set; call before importing prefect, mlflow, transformers or torch.

    Raises:
        ConfigError: a home that cannot be used, or a proxy of an unknown kind.
    """
    for name, value in defaults(console_level).items():
        os.environ.setdefault(name, value)
    os.environ.update(addresses.direct(os.environ))
    services = recorded_services()
    alive = services.alive() if services else {}
    # Each on its own: next to a live server, an ephemeral one on the same database would compete for its lock.
    if services and "prefect" in alive:
        _use("PREFECT_API_URL", services.prefect_url, authentication.prefect_client())
    if services and "mlflow" in alive:
        _use("MLFLOW_TRACKING_URI", services.mlflow_url, authentication.mlflow_client())


def _use(variable: str, url: str, login: Mapping[str, str]) -> None:
    """Take our server unless the user has named another, which is not told the passwords of ours."""
    if os.environ.setdefault(variable, url).rstrip("/") == url:
        for name, value in login.items():
            os.environ.setdefault(name, value)
        os.environ.update(addresses.direct(os.environ, urlsplit(url).hostname or ""))
