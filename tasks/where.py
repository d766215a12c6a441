"""The commands and addresses that lead from the terminal to the pages of a run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from deployments.local import environment
from fedlora.files import home
from mlflow_tracking import store

PREFECT_PORT, MLFLOW_PORT = 4200, 5000
"""Ports of `fedlora up`."""


def lines(mlflow_uri: str, page: str, flow_run: str) -> list[str]:
    """What to type, and what to open, to see a page of MLflow and a flow run (its id) in Prefect."""
    return [
        *_to_start(mlflow_uri),
        f"MLflow            {mlflow_page(mlflow_uri, page)}",
        f"Prefect           {prefect_page(flow_run)}",
    ]


def mlflow_page(uri: str, page: str) -> str:
    """The address of a page: on the server that is tracked to, or on the one that shows the tracked database."""
    services = environment.running_services()
    server = uri if store.is_server(uri) else services.mlflow_url if services else f"http://127.0.0.1:{MLFLOW_PORT}"
    return f"{server.rstrip('/')}/{page}"


def _to_start(mlflow_uri: str) -> list[str]:
    started = [] if environment.running_services() else [f"start the pages   {command('fedlora')} up"]
    if store.is_server(mlflow_uri) or mlflow_uri == home.sqlite_url(home.mlflow_database()):
        return started
    own = f"{command('mlflow')} server --port {MLFLOW_PORT} --backend-store-uri {shlex.quote(mlflow_uri)}"
    return [f"start MLflow      {own}", *started]


def prefect_page(flow_run: str) -> str:
    """The address of a flow run's page: on the server that is configured, or on the one that `fedlora up` starts."""
    from prefect.utilities.urls import url_for  # which knows Prefect Cloud and PREFECT_UI_URL, too

    services = environment.running_services()
    configured = os.environ.get("PREFECT_API_URL") or (services.prefect_url if services else "")
    ours = configured.rstrip("/").removesuffix("/api") or f"http://127.0.0.1:{PREFECT_PORT}"
    return url_for("flow-run", obj_id=flow_run, default_base_url=ours) or ours if flow_run else f"{ours}/runs"


def command(name: str) -> str:
    """How a program of this installation is called, as short as the working directory allows."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        return name
    try:
        return shlex.quote(str(path.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(path))
