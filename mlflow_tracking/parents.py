"""The MLflow run of a sweep, under which its federated runs are nested."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import TrackingConfig
from fedlora.config.recalled import recalled
from fedlora.sweep.comparison import Result
from mlflow_tracking import history, store
from mlflow_tracking.judged import Judged

if TYPE_CHECKING:
    from mlflow import MlflowClient

INSTANCE = "fedlora.sweep"
"""Tag of a parent: the execution of the sweep that it belongs to."""


COMPARISON = "comparison"
"""Folder of a parent's artifacts for tables and pictures."""


@dataclass(frozen=True)
class Parent:
    """A sweep's run in MLflow."""

    uri: str
    experiment: str
    run: str


def start(tracking: TrackingConfig, name: str, instance: str, note: str) -> Parent:
    """Open the parent run of a sweep.

    Raises:
        TrackingError: the store does not answer, or the experiment was deleted.
    """
    uri = store.resolve_uri(tracking.uri)
    store.check(uri)
    with store.errors(uri):
        client = store.client(uri)
        experiment = store.experiment_id(client, uri, tracking.experiment)
        tags = {"sweep": name, INSTANCE: instance, "mlflow.note.content": note, **store.source(f"fedlora sweep {name}")}
        run = client.create_run(experiment, tags=tags, run_name=f"sweep {name}")
    return Parent(uri, experiment, run.info.run_id)


def there(parent: Parent) -> bool:
    """Whether a sweep's run is still in MLflow: somebody may have deleted it.

    Raises:
        TrackingError: the store does not answer.
    """
    store.check(parent.uri)
    with store.errors(parent.uri):
        return store.find_run(store.client(parent.uri), parent.run) is not None


def is_closed(parent: Parent) -> bool:
    """Whether the sweep of a parent run came to its end, so that all it leaves was logged.

    Raises:
        TrackingError: the store does not answer.
    """
    with store.errors(parent.uri):
        run = store.find_run(store.client(parent.uri), parent.run)
    return run is not None and run.info.status == "FINISHED"


def resume(parent: Parent) -> None:
    """Open the parent run of an interrupted sweep again.

    Raises:
        TrackingError: the store does not answer.
    """
    with store.errors(parent.uri):
        store.client(parent.uri).update_run(parent.run, status="RUNNING")


def finished(parent: Parent, digest: str = "") -> dict[str, str]:
    """The finished runs under a parent, or the one of a digest: MLflow run id by the digest of the configuration.

    Raises:
        TrackingError: the store does not answer.
    """
    query = f"{store.children_of(parent.run)} and attributes.status = 'FINISHED'"
    if digest:
        query += f" and tags.`fedlora.config` = '{digest}'"
    with store.errors(parent.uri):
        children = store.search_runs(store.client(parent.uri), [parent.experiment], query)
    return {run.data.tags["fedlora.config"]: run.info.run_id for run in reversed(children)}


def results(parent: Parent, settings: dict[str, dict[str, Any]]) -> list[Result]:
    """What finished runs came to, read from MLflow.

    Args:
        parent: the sweep's run.
        settings: by MLflow run id, what tells the runs apart.

    Raises:
        TrackingError: the store does not answer.
        ConfigError: the task of a run is not installed here.
    """
    with store.errors(parent.uri):
        client = store.client(parent.uri)
        runs = {run_id: client.get_run(run_id) for run_id in settings}
        rounds = history.many(client, runs.values())
    return [
        Result(
            settings[run_id],
            rounds[run_id],
            run.data.tags.get("partition.hash", ""),
            run_id,
            Judged.by(recalled(run.data.params)).scores,
        )
        for run_id, run in runs.items()
    ]


def publish(parent: Parent, folder: Path, names: Sequence[str], children: Sequence[str]) -> None:
    """Log what came of a sweep: `names` of its folder as artifacts, and the data sets and partitions of its runs.

    Raises:
        TrackingError: the store does not answer.
    """
    with store.errors(parent.uri):
        client = store.client(parent.uri)
        for name in names:
            if (folder / name).is_file():
                client.log_artifact(parent.run, str(folder / name), "" if name.endswith(".json") else COMPARISON)
        _show_data(client, parent, children)


def describe(parent: Parent, note: str) -> None:
    """Set the description of a sweep's run (Markdown).

    Raises:
        TrackingError: the store does not answer.
    """
    with store.errors(parent.uri):
        store.client(parent.uri).set_tag(parent.run, "mlflow.note.content", note)


def _show_data(client: MlflowClient, parent: Parent, children: Sequence[str]) -> None:
    runs = [client.get_run(run_id) for run_id in children]
    for tag in ("partition.hash", "data.digest"):
        values = sorted({run.data.tags.get(tag, "") for run in runs})
        client.set_tag(parent.run, tag, ", ".join(values)[:5000])
    inputs = {entry.dataset.digest: entry for run in runs for entry in run.inputs.dataset_inputs}
    if inputs:
        client.log_inputs(parent.run, datasets=list(inputs.values()))


@contextmanager
def closing(parent: Parent) -> Iterator[None]:
    """Close the parent run when the sweep ends: finished, failed, or killed."""
    try:
        yield
    except BaseException as error:
        store.close(parent.uri, parent.run, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    store.close(parent.uri, parent.run, "FINISHED")
