"""Which run folder a person means."""

from __future__ import annotations

import re
from pathlib import Path

from fedlora.errors import ConfigError, did_you_mean
from fedlora.files import home, remote
from fedlora.sweep.folder import STATE

_MLFLOW_ID = re.compile(r"[0-9a-f]{32}")
_PREFECT_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def folder_of(what: str) -> Path:
    """The folder of a run, by its path, its name among the runs of our home, or its id in MLflow or Prefect; by a URL,
    a copy of it as it is now.

    Raises:
        ConfigError: there is none; says what there is.
        TrackingError: an id was given, and the tracking store does not answer.
    """
    if remote.is_url(what):
        return remote.Remote(what).fetched()
    if _MLFLOW_ID.fullmatch(what) or _PREFECT_ID.fullmatch(what):
        return _by_id(what)
    for folder in (Path(what).expanduser().absolute(), home.runs() / what):
        if (folder / STATE).exists():
            raise ConfigError(f"{folder} is a sweep; the command that began it, `fedlora sweep …`, also continues it")
        if folder.is_dir():
            return folder
    known = [path.name for path in home.runs().glob("*") if path.is_dir()]
    raise ConfigError(
        f"no run '{what}': neither a folder, nor in {home.runs()}, nor an id of MLflow (32 letters and digits) or "
        f"Prefect.{did_you_mean(what, known)}"
    )


def _by_id(what: str) -> Path:
    from mlflow_tracking import store

    uri = store.resolve_uri(None)
    store.check(uri)
    with store.errors(uri):
        client = store.client(uri)
        if _MLFLOW_ID.fullmatch(what):
            run = store.find_run(client, what)
        else:
            experiments = [each.experiment_id for each in client.search_experiments()]
            query = f"tags.`prefect.flow_run_id` = '{what}'"
            run = next(iter(store.search_runs(client, experiments, query)), None)
    if run is None:
        raise ConfigError(f"the tracking store {uri} knows no run {what}; name its folder instead")
    folder = run.data.tags.get("fedlora.run_folder")
    if folder is None:
        raise ConfigError(f"run {what} is none of fedlora's: it has no tag fedlora.run_folder")
    if remote.is_url(folder):
        return remote.Remote(folder).fetched()
    if not Path(folder).is_dir():
        raise ConfigError(f"the folder of run {what}, {folder}, is not on this machine")
    return Path(folder)
