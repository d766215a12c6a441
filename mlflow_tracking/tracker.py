"""One federated run in MLflow: parameters, tags, data, a batch of metrics per round, artifacts.

Everything is idempotent: the MLflow run's id and how far it got are kept in the run folder, points carry the timestamp
of the round's record, so that a retry or a late delivery adds nothing twice. While the store does not answer, rounds
wait in the run folder; they are delivered in order when it does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fedlora
from fedlora import metrics
from fedlora.config import configfile
from fedlora.errors import TrackingError
from fedlora.metrics import RoundRecord
from fedlora.model import provenance
from fedlora.report import plots
from fedlora.run import export, rounds
from fedlora.run.records import Setup
from fedlora.run.runfolder import RunFolder
from mlflow_tracking import store

PATIENCE_S = 120.0
"""How long the end of a run waits for a store that is away."""

_ASK_AGAIN_S = 2.0
_FILE = "tracking.json"
_FINISHED = "FINISHED"
_ADAPTER = "adapter"
"""Folder of the final adapter, in the run folder and among the artifacts."""
_RUN_ID = "fedlora.run"
"""Tag: the id of the run folder."""


@dataclass(frozen=True)
class Tracked:
    """A federated run's counterpart in MLflow."""

    uri: str
    experiment: str
    run: str
    logged: int = -1
    """The last round that was delivered; -1: none."""
    described: bool = False
    """Whether configuration, data and partition have been."""

    def save(self, run: RunFolder) -> None:
        run.write_json(_FILE, asdict(self))


def load(run: RunFolder) -> Tracked | None:
    """The MLflow run that belongs to a run folder, if one was started."""
    content = run.read_json(_FILE)
    return Tracked(**content) if content else None


def start(
    run: RunFolder,
    name: str,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
    begun_ms: int | None = None,
) -> Tracked:
    """Open the MLflow run of a run folder, or go on with the one it already has (also while the store is away).

    Args:
        run: the run folder.
        name: shown in MLflow.
        parent: MLflow run id of the sweep that this run belongs to.
        tags: further tags.
        begun_ms: when a new run began, in ms since 1970; now without it.

    Raises:
        TrackingError: the store does not answer and the run is new, or its experiment was deleted.
    """
    existing, uri = load(run), store.resolve_uri(run.config.tracking.uri)
    given = {**_tags(run, parent), **(tags or {})}
    if existing and existing.uri == uri:
        try:
            return _again(run, existing) or _new(run, uri, name, begun_ms, given)
        except TrackingError:
            return existing
    return _new(run, uri, name, begun_ms, given)


def _again(run: RunFolder, existing: Tracked) -> Tracked | None:
    """The run that the folder knows of; None where somebody deleted it."""
    store.check(existing.uri)
    with store.errors(existing.uri):
        client = store.client(existing.uri)
        found = store.find_run(client, existing.run)
        if not found:
            return None
        if found.info.status != _FINISHED:  # which keeps its end and its duration
            client.update_run(existing.run, status="RUNNING")
    return existing


def _new(run: RunFolder, uri: str, name: str, begun_ms: int | None, tags: Mapping[str, str]) -> Tracked:
    """A new run; or the one that was opened before the folder could take note of it."""
    config = run.config
    store.check(uri)
    with store.errors(uri):
        client = store.client(uri)
        experiment = store.experiment_id(client, uri, config.tracking.experiment)
        opened = store.search_runs(client, [experiment], f"tags.`{_RUN_ID}` = '{run.id}'")
        created = opened[0] if opened else client.create_run(experiment, begun_ms, tags, name)
        tracked = Tracked(uri, experiment, created.info.run_id)
        _log_params(client, tracked, run)
        tracked.save(run)
    return tracked


def _describe(client: Any, run: RunFolder, tracked: Tracked) -> None:
    """Log what is known once the data is partitioned: configuration, data set, partition and its picture."""
    _log_data(client, tracked, run)
    for name, folder in (("config.yaml", None), ("partition.json", None), ("figures/partition.png", "figures")):
        client.log_artifact(tracked.run, str(run.path / name), folder)


def offer(run: RunFolder, tracked: Tracked) -> tuple[Tracked, str]:
    """Deliver what can be delivered; returns how far it got, and why not everything was taken (mostly nothing).

    What was not taken waits in the run folder for the next call.
    """
    try:
        store.check(tracked.uri)  # seconds, where MLflow itself would try for minutes
        return deliver(run, tracked), ""
    except TrackingError as error:
        return load(run) or tracked, str(error)


def deliver(run: RunFolder, tracked: Tracked) -> Tracked:
    """Log what is not in MLflow yet: the run's description, then every finished round, one batch each, in order.

    Returns how far it got.

    Raises:
        TrackingError: the store does not answer; what is missing is delivered by the next call.
    """
    with store.errors(tracked.uri):
        client = store.client(tracked.uri)
        if not tracked.described:
            _describe(client, run, tracked)
            tracked = replace(tracked, described=True)
            tracked.save(run)
        while record := rounds.read_record(run, tracked.logged + 1):
            _log_metrics(client, tracked, record, record.metrics)
            _log_answers(client, tracked, run, record.round)
            _log_round_adapter(client, tracked, run, record.round)
            tracked = replace(tracked, logged=record.round)
            tracked.save(run)
    return tracked


def finish(run: RunFolder, tracked: Tracked, note: str, patience_s: float = PATIENCE_S) -> None:
    """Deliver what is missing, log the results and artifacts of a finished run, and close it.

    A store that is away is waited for.

    Args:
        run: the run folder, complete.
        tracked: its counterpart.
        note: shown on its page.
        patience_s: seconds to wait.

    Raises:
        TrackingError: it does not answer for so long; says how to deliver the run later.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            store.check(tracked.uri)
            delivered = deliver(run, load(run) or tracked)
            if not _is_finished(delivered):
                _close(run, delivered, note)
            return
        except TrackingError as error:
            if time.monotonic() >= until:
                raise TrackingError(
                    f"the run is complete in {run.path}, but not in MLflow: {error}. `fedlora resume {run.path}` "
                    "delivers it when MLflow answers again"
                ) from error
            time.sleep(_ASK_AGAIN_S)


def _is_finished(tracked: Tracked) -> bool:
    with store.errors(tracked.uri):
        found = store.find_run(store.client(tracked.uri), tracked.run)
    return bool(found) and found.info.status == _FINISHED


def _close(run: RunFolder, tracked: Tracked, note: str) -> None:
    records = rounds.records(run)
    last = records[-1]
    with store.errors(tracked.uri):
        client = store.client(tracked.uri)
        finals = metrics.finals(last.metrics, run.score)
        seconds = metrics.seconds(records)
        finals |= {} if seconds is None else {metrics.FINAL_SECONDS: seconds}
        _log_metrics(client, tracked, last, finals, _log_model(client, tracked, run))
        for folder in (_ADAPTER, "tables", "figures"):
            client.log_artifacts(tracked.run, str(run.path / folder), folder)
        client.set_tag(tracked.run, "mlflow.note.content", note)
        client.set_terminated(tracked.run, _FINISHED)


def _tags(run: RunFolder, parent: str | None) -> dict[str, str]:
    config = run.config
    tags = {
        "strategy": config.strategy,
        "mlflow.runColor": plots.colour(config.strategy),
        "fedlora.version": fedlora.__version__,
        "fedlora.config": config.digest(),
        "fedlora.run_folder": run.place,
        _RUN_ID: run.id,
        **({"fedlora.extends": run.extends} if run.extends else {}),
        **store.source("fedlora sweep" if parent else "fedlora run"),
    }
    if config.model.trust_remote_code:
        tags["fedlora.trust_remote_code"] = "true"
    return tags | ({"mlflow.parentRunId": parent} if parent else {})


def _log_params(client: Any, tracked: Tracked, run: RunFolder) -> None:
    from mlflow.entities import Param

    flat = configfile.flatten(run.config.model_dump(mode="json"))
    params = [Param(key, _as_text(value)) for key, value in flat.items() if value not in (None, {})]
    client.log_batch(tracked.run, params=params)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _log_model(client: Any, tracked: Tracked, run: RunFolder) -> str:
    """The final adapter as a model of the run, to which its page and the table of runs lead; the id of the model.

    What an earlier try has left is gone on with.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    config = run.config
    made = client.search_logged_models([tracked.experiment], f"source_run_id = '{tracked.run}'")
    about = {"strategy": config.strategy, "model.name": config.model.name, "data.name": config.data.name}
    named = f"{config.strategy} adapter"
    model = (
        made[0]
        if made
        else client.create_logged_model(tracked.experiment, named, tracked.run, params=about, model_type="PEFT adapter")
    )
    if model.status != LoggedModelStatus.READY:
        client.log_model_artifacts(model.model_id, str(run.path / _ADAPTER))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    if not client.get_run(tracked.run).outputs.model_outputs:
        client.log_outputs(tracked.run, [LoggedModelOutput(model.model_id, config.rounds)])
    return str(model.model_id)


def _log_metrics(
    client: Any, tracked: Tracked, record: RoundRecord, values: Mapping[str, float], model: str | None = None
) -> None:
    """A record's values in one batch; those of a model are on its page, too."""
    from mlflow.entities import Metric

    batch = [Metric(name, float(value), record.timestamp_ms, record.round, model) for name, value in values.items()]
    client.log_batch(tracked.run, metrics=batch)


def _log_data(client: Any, tracked: Tracked, run: RunFolder) -> None:
    """The data set as an MLflow input, and the partition's hash as a tag: runs with equal hashes can be compared."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    setup, partition = Setup.read(run), run.need_json("partition.json")
    data = setup.data
    profile = {"examples": setup.examples, "labels": len(setup.labels), "partition": partition["hash"]}
    dataset = Dataset(
        name=data.name,
        digest=data.digest[:16],
        source_type=data.origin,
        source=json.dumps({"name": data.name, "origin": data.origin, "read": data.read}),
        schema=json.dumps({"labels": setup.labels}),
        profile=json.dumps(profile),
    )
    client.log_inputs(tracked.run, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
    client.set_tag(tracked.run, "partition.hash", partition["hash"])
    head = (run.read_record(run.state_stem(0)) or {}).get("head")
    tags = {
        "data.digest": data.digest,
        **provenance.tags(setup.model),
        **({"model.head": head} if head else {}),
    }
    for name, value in tags.items():
        client.set_tag(tracked.run, name, value)


def _log_answers(client: Any, tracked: Tracked, run: RunFolder, number: int) -> None:
    """What was answered in writing so far, as a table that MLflow's page shows and `load_table` reads."""
    if file := export.answers(run, number):
        client.log_artifact(tracked.run, str(file), "tables")
        shown = [{"path": f"tables/{file.name}", "type": "table"}]
        client.set_tag(tracked.run, "mlflow.loggedArtifacts", json.dumps(shown))


def _log_round_adapter(client: Any, tracked: Tracked, run: RunFolder, number: int) -> None:
    every = run.config.tracking.adapter_every
    if every and number and number % every == 0:
        name = f"adapter/round-{number:03d}"
        folder = Path(run.path / "adapters" / f"round-{number:03d}")
        export.adapter(run, number, folder)
        client.log_artifacts(tracked.run, str(folder), name)
