"""The one place on disk where everything is kept unless told otherwise: `$FEDLORA_HOME`, or `~/.fedlora`.

Nothing depends on the working directory.
"""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The absolute root folder (not created here)."""
    return Path(os.environ.get("FEDLORA_HOME") or Path.home() / ".fedlora").expanduser().absolute()


def runs() -> Path:
    """Run folders."""
    return home() / "runs"


def sweeps() -> Path:
    """Sweep folders: the comparison table and pictures of several runs."""
    return home() / "sweeps"


def cache() -> Path:
    """Tokenised data sets, shared by runs."""
    return home() / "cache"


def data_dir() -> Path | None:
    """The user's folder of data sets, `$FEDLORA_DATA_DIR`, if it is set."""
    value = os.environ.get("FEDLORA_DATA_DIR")
    return Path(value).expanduser().absolute() if value else None


def mlflow_database() -> Path:
    """SQLite file of the default tracking store."""
    return home() / "mlflow.db"


def mlflow_artifacts() -> Path:
    """Artifacts of the default tracking store."""
    return home() / "mlartifacts"


def mlflow_auth_database() -> Path:
    """SQLite file with the users of MLflow, and hashes of their passwords, where `fedlora up` asks for them."""
    return home() / "mlflow-auth.db"


def mlflow_auth_file() -> Path:
    """Settings of MLflow's authentication; holds no password."""
    return home() / "mlflow-auth.ini"


def prefect_database() -> Path:
    """SQLite file of the default Prefect server."""
    return home() / "prefect.db"


def services_file() -> Path:
    """What `fedlora up` started: process ids, ports and URLs."""
    return home() / "services.json"


def logs() -> Path:
    """Logs of the servers and the worker that `fedlora up` starts."""
    return home() / "logs"
