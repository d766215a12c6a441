"""The MLflow run of a sweep, under which its federated runs are nested."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedlora.config import TrackingConfig
from mlflow_tracking import store


@dataclass(frozen=True)
class Parent:
    """A sweep's run in MLflow."""

    uri: str
    experiment: str
    run: str


def start(tracking: TrackingConfig, name: str, note: str) -> Parent:
    """Open the parent run of a sweep.

    Raises:
        TrackingError: the store does not answer, or the experiment was deleted.
    """
    uri = store.resolve_uri(tracking.uri)
    store.check(uri)
    with store.errors(uri):
        client = store.client(uri)
        experiment = store.experiment_id(client, uri, tracking.experiment)
        run = client.create_run(experiment, tags={"sweep": name, "mlflow.note.content": note}, run_name=f"sweep {name}")
    return Parent(uri, experiment, run.info.run_id)


def publish(parent: Parent, folder: Path, note: str) -> None:
    """Log the comparison of a sweep: its table and picture, and the leaderboard as the run's description.

    Raises:
        TrackingError: the store does not answer.
    """
    with store.errors(parent.uri):
        client = store.client(parent.uri)
        client.log_artifacts(parent.run, str(folder), "comparison")
        client.set_tag(parent.run, "mlflow.note.content", note)


@contextmanager
def closing(parent: Parent) -> Iterator[None]:
    """Close the parent run when the sweep ends: finished, failed, or killed."""
    try:
        yield
    except BaseException as error:
        store.close(parent.uri, parent.run, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    store.close(parent.uri, parent.run, "FINISHED")
