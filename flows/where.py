"""The commands and addresses that lead from the terminal to the pages of a run."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from flows import environment
from mlflow_tracking import store

PREFECT_PORT, MLFLOW_PORT = 4200, 5000
"""Ports of `fedlora up`."""


def lines(mlflow_uri: str, experiment: str) -> list[str]:
    """What to type and open to see an experiment in MLflow and its flow runs in Prefect."""
    services = environment.running_services()
    if services:
        mlflow, prefect = services.mlflow_url, services.prefect_url.removesuffix("/api")
    else:
        mlflow, prefect = f"http://127.0.0.1:{MLFLOW_PORT}", f"http://127.0.0.1:{PREFECT_PORT}"
    page = store.experiment_url(mlflow_uri, experiment, mlflow)
    own_server = os.environ.get("PREFECT_API_URL", "").removesuffix("/api")
    start = [] if services else [f"start the pages   {command()} up"]
    return [*start, f"MLflow            {page}", f"Prefect           {own_server or prefect}/runs"]


def command() -> str:
    """How this program is called, as short as the working directory allows."""
    path = Path(sys.argv[0]).absolute()
    if path.name != "fedlora":
        return "fedlora"
    try:
        return shlex.quote(str(path.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(path))
