"""What runs keep as files in MLflow, read back."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from fedlora.config import configfile
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient


def rows(content: Any) -> Any:
    """The rows of a table as MLflow shows it; other content as it is."""
    if isinstance(content, dict) and {"columns", "data"} <= content.keys():
        return [dict(zip(content["columns"], row, strict=False)) for row in content["data"]]
    return content


def stacked(contents: dict[tuple[str, str], Any], path: str) -> pd.DataFrame:
    """The rows that several runs keep at a path, one table below the other, with the run's id in front.

    Args:
        contents: by run id and path.
        path: of a file that holds a list of rows.
    """
    parts = [
        pd.DataFrame(content).assign(run_id=run)
        for (run, name), content in contents.items()
        if name == path and isinstance(content, list) and content
    ]
    if not parts:
        return pd.DataFrame()
    whole = pd.concat(parts, ignore_index=True)
    return whole[["run_id", *(column for column in whole.columns if column != "run_id")]]


def read(client: MlflowClient, run_id: str, path: str) -> Any:
    """A JSON or YAML artifact of a run; None where it has none, or one that cannot be read."""
    from mlflow.exceptions import MlflowException

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar for each of hundreds of small files
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = Path(client.download_artifacts(run_id, path, folder))
            return configfile.read_yaml(file) if path.endswith(".yaml") else json.loads(file.read_text("utf-8"))
        except (MlflowException, OSError, ValueError, yaml.YAMLError, ConfigError):
            return None
