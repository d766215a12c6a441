"""One federated run in MLflow: parameters, tags, data, a batch of metrics per round, artifacts.

Everything is idempotent: the MLflow run's id and how far it got are kept in the run folder, points carry the timestamp
of the round's record, so that a retry or a late delivery adds nothing twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fedlora
from fedlora import configfile, export, metrics, plots, rounds
from fedlora.metrics import RoundRecord
from fedlora.runfolder import RunFolder
from mlflow_tracking import store

_FILE = "tracking.json"

FINALS = {
    metrics.GLOBAL_ACCURACY: "final/accuracy",
    metrics.GLOBAL_MACRO_F1: "final/macro_f1",
    metrics.GLOBAL_LOSS: "final/loss",
    metrics.LOCAL_ACCURACY: "final/local_accuracy",
    metrics.GAP_ACCURACY: "final/gap",
    metrics.RHO_MODEL: "final/rho",
    metrics.RHO_FLOOR: "final/rho_floor",
    metrics.BYTES_TOTAL: "final/bytes",
}
"""The last round's metrics that are repeated as a run's results, and their names there."""


@dataclass(frozen=True)
class Tracked:
    """A federated run's counterpart in MLflow; `logged` is the last round that was delivered (-1: none)."""

    uri: str
    experiment: str
    run: str
    logged: int = -1

    def save(self, run: RunFolder) -> None:
        run.write_json(_FILE, asdict(self))


def load(run: RunFolder) -> Tracked | None:
    """The MLflow run that belongs to a run folder, if one was started."""
    content = run.read_json(_FILE)
    return Tracked(**content) if content else None


def start(run: RunFolder, name: str, parent: str | None = None, tags: Mapping[str, str] | None = None) -> Tracked:
    """Open the MLflow run of a run folder, or go on with the one it already has.

    Args:
        run: the run folder.
        name: shown in MLflow.
        parent: MLflow run id of the sweep that this run belongs to.
        tags: further tags.

    Raises:
        TrackingError: the store does not answer, or its experiment was deleted.
    """
    config = run.config
    uri = store.resolve_uri(config.tracking.uri)
    store.check(uri)
    with store.errors(uri):
        client = store.client(uri)
        existing = load(run)
        if existing and existing.uri == uri and store.find_run(client, existing.run):
            client.update_run(existing.run, status="RUNNING")
            return existing
        experiment = store.experiment_id(client, uri, config.tracking.experiment)
        created = client.create_run(experiment, tags=_tags(run, parent) | dict(tags or {}), run_name=name)
        tracked = Tracked(uri, experiment, created.info.run_id)
        _log_params(client, tracked, run)
        tracked.save(run)
    return tracked


def describe(run: RunFolder, tracked: Tracked) -> None:
    """Log what is known once the data is partitioned: configuration, data set, partition and its picture.

    Raises:
        TrackingError: the store does not answer.
    """
    with store.errors(tracked.uri):
        client = store.client(tracked.uri)
        _log_data(client, tracked, run)
        for name, folder in (("config.yaml", None), ("partition.json", None), ("figures/partition.png", "figures")):
            client.log_artifact(tracked.run, str(run.path / name), folder)


def deliver(run: RunFolder, tracked: Tracked) -> Tracked:
    """Log every finished round that is not in MLflow yet, one batch each, in order; returns how far it got.

    Raises:
        TrackingError: the store does not answer; what is missing is delivered by the next call.
    """
    with store.errors(tracked.uri):
        client = store.client(tracked.uri)
        for record in rounds.records(run):
            if record.round > tracked.logged:
                _log_metrics(client, tracked, record, record.metrics)
                _log_round_adapter(client, tracked, run, record.round)
                tracked = replace(tracked, logged=record.round)
                tracked.save(run)
    return tracked


def finish(run: RunFolder, tracked: Tracked, note: str) -> None:
    """Log the results and artifacts of a finished run and close it.

    Raises:
        TrackingError: the store does not answer.
    """
    last = rounds.records(run)[-1]
    with store.errors(tracked.uri):
        client = store.client(tracked.uri)
        finals = {name: last.metrics[source] for source, name in FINALS.items() if source in last.metrics}
        finals["final/seconds"] = sum(record.metrics[metrics.TIME_ROUND] for record in rounds.records(run))
        _log_metrics(client, tracked, last, finals)
        for folder in ("adapter", "tables", "figures"):
            client.log_artifacts(tracked.run, str(run.path / folder), folder)
        client.set_tag(tracked.run, "mlflow.note.content", note)
        client.set_terminated(tracked.run, "FINISHED")


def _tags(run: RunFolder, parent: str | None) -> dict[str, str]:
    config = run.config
    tags = {
        "strategy": config.strategy,
        "mlflow.runColor": plots.colour(config.strategy),
        "fedlora.version": fedlora.__version__,
        "fedlora.config": config.digest(),
        "fedlora.run_folder": str(run.path),
    }
    return tags | ({"mlflow.parentRunId": parent} if parent else {})


def _log_params(client: Any, tracked: Tracked, run: RunFolder) -> None:
    from mlflow.entities import Param

    flat = configfile.flatten(run.config.model_dump(mode="json"))
    params = [Param(key, _as_text(value)) for key, value in flat.items() if value not in (None, {})]
    client.log_batch(tracked.run, params=params)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _log_metrics(client: Any, tracked: Tracked, record: RoundRecord, values: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    batch = [Metric(name, float(value), record.timestamp_ms, record.round) for name, value in values.items()]
    client.log_batch(tracked.run, metrics=batch)


def _log_data(client: Any, tracked: Tracked, run: RunFolder) -> None:
    """The data set as an MLflow input, and the partition's hash as a tag: runs with equal hashes can be compared."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    setup, partition = run.need_json("setup.json"), run.need_json("partition.json")
    data = setup["data"]
    profile = {"examples": setup["examples"], "labels": len(setup["labels"]), "partition": partition["hash"]}
    dataset = Dataset(
        name=data["name"],
        digest=data["digest"][:16],
        source_type=data["origin"],
        source=json.dumps({"name": data["name"], "origin": data["origin"]}),
        schema=json.dumps({"labels": setup["labels"]}),
        profile=json.dumps(profile),
    )
    client.log_inputs(tracked.run, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
    client.set_tag(tracked.run, "partition.hash", partition["hash"])
    client.set_tag(tracked.run, "data.digest", data["digest"])


def _log_round_adapter(client: Any, tracked: Tracked, run: RunFolder, number: int) -> None:
    every = run.config.tracking.adapter_every
    if every and number and number % every == 0:
        name = f"adapter/round-{number:03d}"
        folder = Path(run.path / "adapters" / f"round-{number:03d}")
        export.adapter(run, number, folder)
        client.log_artifacts(tracked.run, str(folder), name)
