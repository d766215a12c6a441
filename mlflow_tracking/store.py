"""Where the tracking store is, whether it answers, and its experiments.

Only `MlflowClient` with explicit run ids is used: MLflow's active run is thread-local, and a fluent call in a task
would silently open an orphan run.
"""

from __future__ import annotations

import os
import sqlite3
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import addresses
from fedlora.errors import TrackingError, first_line
from fedlora.files import home
from fedlora.metrics import FINAL

if TYPE_CHECKING:
    import requests
    from mlflow import MlflowClient

    from fedlora.objective import Score

_ANSWER_WITHIN_S = 5
_CHEAP = "/api/2.0/mlflow/experiments/search?max_results=1"
"""A request that needs a login where there is one."""
_SQLITE = ("sqlite:///", "sqlite+pysqlite:///")
_PAGE = 1000
"""Runs per request."""


def resolve_uri(configured: str | None) -> str:
    """The tracking URI: the configured one, $MLFLOW_TRACKING_URI, or the SQLite file under `fedlora.files.home`.

    Raises:
        TrackingError: it holds a password, which would be written to the run folder. The message does not hold it.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI") or home.sqlite_url(home.mlflow_database())
    if addresses.holds_secret(uri):
        what = "tracking.uri" if configured else "MLFLOW_TRACKING_URI"
        raise TrackingError(f"{what} holds a password, which would be written down; {addresses.advice(uri)}")
    return uri


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
    elif uri.startswith(_SQLITE):
        folder = os.path.dirname(_database_file(uri)) or "."
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


def check_experiment(uri: str, name: str) -> None:
    """Whether runs can be logged to an experiment; without MLflow's client where that takes seconds to open.

    Raises:
        TrackingError: it was deleted.
    """
    found = _experiment_in_file(uri, name) if uri.startswith(_SQLITE) else _experiment(uri, name)
    if found and found[1] == "deleted":
        raise _was_deleted(name, found[0])


def _was_deleted(name: str, experiment: str) -> TrackingError:
    return TrackingError(
        f"MLflow experiment '{name}' was deleted; restore it (mlflow experiments restore -x {experiment}) or choose "
        "another tracking.experiment"
    )


def _experiment_in_file(uri: str, name: str) -> tuple[str, str] | None:
    """Id and stage of an experiment, read from MLflow's database; None where there is none, or another schema."""
    file = Path(_database_file(uri)).absolute()
    query = "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?"
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=_ANSWER_WITHIN_S)) as database:
            row = database.execute(query, [name]).fetchone()
    except sqlite3.Error:
        return None
    return (str(row[0]), str(row[1])) if row else None


def _experiment(uri: str, name: str) -> tuple[str, str] | None:
    """The same of any store."""
    if is_server(uri):
        import requests

        query = urllib.parse.urlencode({"experiment_name": name})
        try:
            answer = _get(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name?{query}")
            found = answer.json()["experiment"] if answer.ok else None
        except (requests.RequestException, OSError, ValueError, KeyError):  # told of where the run is opened
            return None
        return (found["experiment_id"], found["lifecycle_stage"]) if found else None
    with errors(uri):
        known = client(uri).get_experiment_by_name(name)
        return (known.experiment_id, known.lifecycle_stage) if known else None


def _database_file(uri: str) -> str:
    """The file of a SQLite address.

    Raises:
        TrackingError: its path holds a `?`, so that the database would be in another file.
    """
    path, mark, options = uri.partition(":///")[2].partition("?")
    if mark and "=" not in options:
        raise TrackingError(
            f"tracking store {uri}: in an address, options begin at '?', so the database would be {path}; choose a "
            "path without it"
        )
    return urllib.parse.unquote(path.removeprefix("file:")) if path.startswith("file:") else path


def _check_server(uri: str) -> None:
    """Whether a server is there, and takes the user and password that MLflow would send."""
    import requests

    try:
        answer = _get(f"{uri.rstrip('/')}/health")
        if answer.status_code != requests.codes.unauthorized:
            answer.raise_for_status()
            answer = _get(f"{uri.rstrip('/')}{_CHEAP}")
    except (requests.RequestException, OSError, ValueError) as error:
        raise TrackingError(
            f"the MLflow server at {uri} does not answer ({_reason(error)}). Start it (`fedlora up`), "
            "or unset MLFLOW_TRACKING_URI / tracking.uri to use the local SQLite file"
        ) from None
    if answer.status_code == requests.codes.unauthorized and not _logs_in_otherwise():
        given = "another" if _login() else "a"
        raise TrackingError(
            f"the MLflow server at {uri} wants {given} user and password; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD in the environment"
        )
    if answer.status_code == requests.codes.forbidden and "Host header" in answer.text:
        raise TrackingError(
            f"the MLflow server at {uri} does not go by this name; add it to MLFLOW_SERVER_ALLOWED_HOSTS where it runs"
        )


def _get(url: str) -> requests.Response:
    import requests

    os.environ.update(addresses.direct(os.environ))
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    trusted = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or not insecure
    return requests.get(url, auth=_login(), verify=trusted, timeout=_ANSWER_WITHIN_S)


def _reason(error: Exception) -> str:
    """Why there was no answer, in few words: requests wraps the cause in several other errors."""
    cause = getattr(error.args[0], "reason", None) if error.args else None
    return str(cause).rpartition(": ")[2] if cause else first_line(error)


def _login() -> tuple[str, str] | None:
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    return (user, password) if user and password else None


def _logs_in_otherwise() -> bool:
    """Whether MLflow has a login that is not looked at here: a token, a plug-in, its file of credentials."""
    named = any(os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("TOKEN", "AUTH"))
    return named or Path("~/.mlflow/credentials").expanduser().exists()


def client(uri: str) -> MlflowClient:
    """A client of the store; the first one on a new database creates its schema (seconds)."""
    from mlflow import MlflowClient

    if is_server(uri):
        os.environ.update(addresses.direct(os.environ))

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
                raise _was_deleted(name, found.experiment_id)
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
    return f"{_run(experiment, run)}?{_query({})}"


def artifact_page(experiment: str, run: str, path: str) -> str:
    """The page that shows an artifact of a run, below a server's address."""
    return f"{_run(experiment, run)}/artifacts/{path}?{_query({})}"


def model_page(name: str) -> str:
    """The page of a registered model, below a server's address."""
    return f"#/models/{name}?{_query({})}"


def children_of(parent: str) -> str:
    """The filter that finds the runs under a sweep's run."""
    return f"tags.`mlflow.parentRunId` = '{parent}'"


def view_page(experiment: str, parent: str) -> str:
    """The chart page of a sweep's runs as its saved view (`views.save`) shows it, below a server's address."""
    return f"#/experiments/{experiment}/runs?{_query({'viewStateShareKey': parent, 'compareRunsMode': 'CHART'})}"


def sweep_page(experiment: str, parent: str, criterion: Score) -> str:
    """The same for a sweep without a view: ten of its runs, best first.

    Sorted by a metric, because MLflow folds children under their parent (and shows no chart) while it sorts by date.
    """
    query = {
        "searchFilter": children_of(parent),
        "orderByKey": f"metrics.`{FINAL}{criterion.name}`",
        "orderByAsc": "false" if criterion.higher_is_better else "true",
        "compareRunsMode": "CHART",
    }
    return f"#/experiments/{experiment}/runs?{_query(query)}"


def source(command: str) -> dict[str, str]:
    """The tags that a run's page shows as its source."""
    return {"mlflow.source.name": command, "mlflow.source.type": "LOCAL"}


def _run(experiment: str, run: str) -> str:
    return f"#/experiments/{experiment}/runs/{run}"


def _query(wanted: Mapping[str, str]) -> str:
    """What a page is asked for; always to stand in "Model training", for MLflow's side bar is else that of traces."""
    return urllib.parse.urlencode({"workflowType": "machine_learning", **wanted}, quote_via=urllib.parse.quote)


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
