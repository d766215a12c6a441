"""The commands and environments of the processes of `fedlora up`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import socket
import sys
from pathlib import Path
from urllib.parse import quote

import httpx

from deployments.local import authentication
from deployments.local.asking import CPU_POOL, GPU_POOL
from deployments.local.environment import Services, of_child, of_server
from deployments.local.server_log import DATE_FORMAT
from fedlora.errors import ConfigError
from fedlora.files import home

TITLES = {
    "prefect": "Prefect server",
    "mlflow": "MLflow server",
    "worker": "worker",
    "gpu-worker": "GPU worker",
}
"""What each process is called in messages, in the order in which they start."""
SERVERS = ("prefect", "mlflow")
WORKERS = {"worker": CPU_POOL, "gpu-worker": GPU_POOL}
"""The pool that each worker serves."""
_OF_FLOW_RUNS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
"""Secrets that neither server has a use for."""
_PREFECT_DATABASE, _OLDER_NAME = "PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"
_MLFLOW_DATABASE = "MLFLOW_BACKEND_STORE_URI"
_OF_DATABASES = (_PREFECT_DATABASE, _OLDER_NAME, _MLFLOW_DATABASE, "PGPASSWORD")
"""What a worker has no use for: it reaches both databases through their servers."""


def commands(services: Services) -> dict[str, list[str]]:
    """What to start, by name of the process. No secret is among the words: every user of the machine can read them."""
    module, host = [sys.executable, "-m"], services.host
    prefect, mlflow = (str(httpx.URL(url).port) for url in (services.prefect_url, services.mlflow_url))
    worker = [*module, "prefect", "worker", "start", "--type", "process"]
    asking = ["--app-name", "basic-auth"] if services.authenticated else []
    return {
        "prefect": [*module, "prefect", "server", "start", "--host", host, "--port", prefect],
        # One server process: requests run in its threads, and SQLite has one writer in any case.
        "mlflow": [*module, "mlflow", "server", "--host", host, "--port", mlflow, "--workers", "1", *asking],
        **{
            name: [*worker, "--pool", pool, "--name", f"{name}-{socket.gethostname()}"]
            for name, pool in WORKERS.items()
        },
    }


def databases() -> dict[str, str]:
    """Where each server keeps what it knows: what its own variable says, or an SQLite file under `fedlora.files.home`.

    Raises:
        ConfigError: no address, or one database for both; shows neither, for they may hold a password.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    prefect = os.environ.get(_PREFECT_DATABASE) or os.environ.get(_OLDER_NAME)
    found = {
        _PREFECT_DATABASE: prefect or home.sqlite_url(home.prefect_database(), "aiosqlite"),
        _MLFLOW_DATABASE: os.environ.get(_MLFLOW_DATABASE) or home.sqlite_url(home.mlflow_database()),
    }
    places = set()
    for variable, address in found.items():
        try:
            url = make_url(address)
            if url.get_backend_name() not in ("sqlite", "postgresql", "mysql", "mssql"):
                raise ValueError  # MLflow would log the address, its password too
        except (ArgumentError, ValueError):
            raise ConfigError(f"{variable} is no address of a database (docs/deployments.md, 'PostgreSQL')") from None
        places.add((url.host, url.port or 5432, url.database))
    if len(places) == 1:
        raise ConfigError(
            f"{_PREFECT_DATABASE} and {_MLFLOW_DATABASE} name the same database; each server needs one of its own, "
            "for both keep a table alembic_version"
        )
    return found


def environments(services: Services) -> dict[str, dict[str, str]]:
    """The environment of each process, stores and passwords included; each gets only those that it needs."""
    common, at = _common(services), databases()
    own = authentication.without(common, _OF_FLOW_RUNS + _OF_DATABASES[:-1])
    prefect = {
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",  # without these two, `--watch` shows events and no log
        "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
        "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "2",  # `up` waits for it; 5 by default
        **DATE_FORMAT,
        **of_server(),
        **_writable_ui_folder(),
        **authentication.without(own, authentication.OF_MLFLOW),
        **authentication.prefect_client(),
        _PREFECT_DATABASE: at[_PREFECT_DATABASE],
    }
    mlflow = {
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": _artifacts(),
        "MLFLOW_ARTIFACTS_DESTINATION": _artifacts(),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # jobs of LLM evaluation: more processes, unused here
        **authentication.without(own, authentication.OF_PREFECT),
        _MLFLOW_DATABASE: at[_MLFLOW_DATABASE],
    }
    if services.authenticated:
        prefect.setdefault("PREFECT_SERVER_UI_API_URL", "/api")  # of whatever address the browser has called
        mlflow |= authentication.mlflow_server(services.host, httpx.URL(services.mlflow_url).port or 80)
    mlflow.pop("MLFLOW_TRACKING_URI", None)
    worker = {
        "MLFLOW_TRACKING_URI": services.mlflow_url,
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # by default a run waits up to ten seconds to be picked up
        **authentication.without(common, authentication.OF_SERVERS + _OF_DATABASES),
        **authentication.prefect_client(),
        **authentication.mlflow_client(),
    }
    return {"prefect": prefect, "mlflow": mlflow, "worker": _without_gpus(worker), "gpu-worker": worker}


def gpus(devices: Path = Path("/dev")) -> int:
    """How many GPUs a worker here can use: NVIDIA devices, unless torch or the environment leaves them out.

    Told without importing torch, which takes seconds.
    """
    try:
        if "+cpu" in importlib.metadata.version("torch"):
            return 0
    except importlib.metadata.PackageNotFoundError:
        return 0
    present = sum(1 for path in devices.glob("nvidia*") if path.name.removeprefix("nvidia").isdigit())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    chosen = [word.strip() for word in visible.split(",")]
    refused = next((index for index, word in enumerate(chosen) if word in ("", "-1")), len(chosen))  # ends the list
    return min(present, refused)


def _artifacts() -> str:
    """The folder of artifacts, as an address where its path holds what MLflow would read as part of one."""
    folder = home.mlflow_artifacts()
    return str(folder) if quote(str(folder)) == str(folder) else folder.as_uri()


def _common(services: Services) -> dict[str, str]:
    """What all processes get."""
    common = {
        **of_child(services.prefect_url),
        "FEDLORA_HOME": str(home.home()),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",  # their console is a log file
    }
    common.pop("FEDLORA_NOTIFY_URL", None)  # is kept in a block of the Prefect server
    return common


def _without_gpus(environ: dict[str, str]) -> dict[str, str]:
    """A pool's limit counts only if its runs keep to its own devices."""
    return {**environ, "CUDA_VISIBLE_DEVICES": ""}


def _writable_ui_folder() -> dict[str, str]:
    """Prefect copies its UI into its own package; where that is read-only, the copy goes under our home."""
    package = importlib.util.find_spec("prefect")
    if package and package.origin and os.access(Path(package.origin).parent / "server", os.W_OK):
        return {}
    return {"PREFECT_UI_STATIC_DIRECTORY": str(home.home() / "prefect-ui")}
