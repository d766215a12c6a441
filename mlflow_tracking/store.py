"""Where the tracking store is, whether it answers, and its experiments.

Only `MlflowClient` with explicit run ids is used: MLflow's active run is thread-local, and a fluent call in a task
would silently open an orphan run.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedlora import home
from fedlora.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ANSWER_WITHIN_S = 5
_PAGE = 1000
"""Runs per request."""


def resolve_uri(configured: str | None) -> str:
    """The tracking URI: the configured one, $MLFLOW_TRACKING_URI, or the SQLite file under `fedlora.home`."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.mlflow_database()}"


def is_server(uri: str) -> bool:
    """Whether the URI names a server (rather than a database or folder)."""
    return uri.startswith(("http://", "https://"))


def check(uri: str) -> None:
    """Cheap test before any work: a server answers, a database file can be written.

    Raises:
        TrackingError: it does not; says what to do.
    """
    if is_server(uri):
        _check_server(uri)
    elif uri.startswith("sqlite:///"):
        folder = os.path.dirname(uri.removeprefix("sqlite:///")) or "."
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise TrackingError(f"tracking store {uri}: cannot make its folder ({error.strerror})") from None
        if not os.access(folder, os.W_OK):
            raise TrackingError(
                f"tracking store {uri}: its folder cannot be written; set tracking.uri or $FEDLORA_HOME"
            )
    elif "://" not in uri:
        raise TrackingError(
            f"tracking.uri={uri}: expected http://…, sqlite:///… or postgresql://… (MLflow writes no plain folders)"
        )


def _check_server(uri: str) -> None:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_ANSWER_WITHIN_S):  # noqa: S310 (http only)
            return
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise TrackingError(
            f"the MLflow server at {uri} does not answer ({getattr(error, 'reason', error)}). Start it (`fedlora up`), "
            "or unset MLFLOW_TRACKING_URI / tracking.uri to use the local SQLite file"
        ) from None


def client(uri: str) -> MlflowClient:
    """A client of the store; the first one on a new database creates its schema (seconds)."""
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


def experiment_id(store: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, created if it is not there.

    Raises:
        TrackingError: it was deleted.
    """
    from mlflow.exceptions import MlflowException

    for _ in range(2):
        found = store.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                raise TrackingError(
                    f"MLflow experiment '{name}' was deleted; restore it (mlflow experiments restore "
                    f"-x {found.experiment_id}) or choose another tracking.experiment"
                )
            return str(found.experiment_id)
        try:
            return str(store.create_experiment(name, artifact_location=_artifact_location(uri, name)))
        except MlflowException as error:
            if "already exists" not in str(error).lower():
                raise
    raise TrackingError(f"MLflow experiment '{name}' can be neither found nor created in {uri}")


def find_run(store: MlflowClient, run: str) -> Any:
    """A run (MLflow's `Run`), or None where there is none of this id or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        found = store.get_run(run)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if found.info.lifecycle_stage == "deleted" else found


def search_runs(store: MlflowClient, experiments: Sequence[str], query: str) -> list[Any]:
    """All runs of some experiments that match, page by page, the latest first."""
    found: list[Any] = []
    token = None
    while experiments:
        page = store.search_runs(list(experiments), query, max_results=_PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    return found


def _artifact_location(uri: str, name: str) -> str | None:
    """An absolute folder for databases (MLflow's default is the working directory); the server's own otherwise."""
    return None if is_server(uri) else (home.mlflow_artifacts() / name).as_uri()


def run_page(experiment: str, run: str) -> str:
    """The page of a run, below a server's address."""
    return f"#/experiments/{experiment}/runs/{run}"


def artifact_page(experiment: str, run: str, path: str) -> str:
    """The page that shows an artifact of a run, below a server's address."""
    return f"{run_page(experiment, run)}/artifacts/{path}"


def sweep_page(experiment: str, parent: str) -> str:
    """The chart page of a sweep's runs, best first, below a server's address.

    Sorted by a metric, because MLflow folds children under their parent (and shows no chart) while it sorts by date.
    """
    query = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent}'",
        "orderByKey": "metrics.`final/accuracy`",
        "orderByAsc": "false",
        "compareRunsMode": "CHART",
    }
    return f"#/experiments/{experiment}/runs?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}"


@contextmanager
def errors(uri: str) -> Iterator[None]:
    """Turn what MLflow and the network throw into one line.

    Raises:
        TrackingError: naming the store.
    """
    import requests
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, requests.RequestException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrackingError(f"the tracking store {uri} does not take what is logged: {reason}") from error


def close(uri: str, run: str, status: str) -> None:
    """End a run as `FINISHED`, `FAILED` or `KILLED`; silent when the store is gone, for nothing can be done then."""
    try:
        with errors(uri):
            client(uri).set_terminated(run, status)
    except TrackingError:
        return
