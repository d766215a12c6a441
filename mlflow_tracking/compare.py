"""Runs read back from MLflow side by side: as a pandas table, and as what a report is made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from fedlora import metrics
from fedlora.config import RunConfig, configfile
from fedlora.errors import TrackingError, did_you_mean
from fedlora.report import frames
from fedlora.report.frames import RUN_COLUMNS, Comparison, Excluded
from fedlora.report.roles import Roles
from mlflow_tracking import artifacts, history, judged, store
from mlflow_tracking.judged import Judged

if TYPE_CHECKING:
    from mlflow import MlflowClient

LATEST = "latest"
_EXPERIMENT = "experiment:"
_PARENT, _SWEEP, _INSTANCE = "mlflow.parentRunId", "sweep", "fedlora.sweep"
_UNFINISHED = {
    "RUNNING": "it is under way, or its process died without a word",
    "SCHEDULED": "it has not begun",
    "FAILED": "it failed: its page in Prefect says why",
    "KILLED": "it was stopped",
}
_LOGGED = "mlflow.loggedArtifacts"
_AT_ONCE = 8
_DIVERGENCE, _CLIENTS, _ANSWERS, _PARTITION, _CONFIG = (
    "tables/divergence.json",
    "tables/clients.json",
    "tables/answers.json",
    "partition.json",
    "config.yaml",
)


@dataclass(frozen=True)
class Source:
    """What a report is about: a sweep's parent run, or an experiment; and the MLflow runs that belong to it."""

    title: str
    experiment: str
    """Its id."""
    parent: Any = None
    """The MLflow run of the sweep; None for an experiment."""

    @property
    def instance(self) -> str:
        """Names this execution of a sweep, or the experiment."""
        if self.parent is None:
            return self.title
        tags = self.parent.data.tags
        return str(tags.get(_INSTANCE) or f"{tags[_SWEEP]}-{self.parent.info.run_id[:8]}")


class _Cell(NamedTuple):
    """A run of a sweep, as its `sweep.json` tells of it."""

    label: str
    status: str
    reason: str
    run: str
    """In MLflow; empty until it has finished."""

    @property
    def finished(self) -> bool:
        return self.status == "finished" and bool(self.run)


def load(experiment: str, *, sweep: str | None = None, uri: str | None = None) -> pd.DataFrame:
    """The federated runs of an experiment, finished or not: a row each, the latest first (parents of sweeps left out).

    Columns: `run_id`, `name`, `status`, `sweep` (the execution it was made in), `strategy`, `seed`, `partition` (hash),
    `digest` (of the configuration), `started` (UTC); then every setting under its dotted name (`lora.rank`); then the
    results (`final/accuracy`, …). What a run does not have is missing (NaN).

    Args:
        experiment: its name in MLflow.
        sweep: only the runs of this sweep; its name (its latest execution) or one execution.
        uri: the tracking store. None: as everywhere, $MLFLOW_TRACKING_URI or the SQLite file of $FEDLORA_HOME.

    Raises:
        TrackingError: the store does not answer; the experiment or sweep is unknown (with near names) or deleted.
    """
    where = store.resolve_uri(uri)
    store.check(where)
    with store.errors(where):
        client = store.client(where)
        found = _experiment(client, where, experiment)
        parents = _parents(client, [found])
        if sweep is None:
            return table(
                [run for run in store.search_runs(client, [found], "") if _SWEEP not in run.data.tags], parents
            )
        parent = _parent(parents, sweep)
        if parent is None:
            names = [name for run in parents for name in _names(run)]
            raise TrackingError(
                f"MLflow experiment '{experiment}' has no sweep '{sweep}'.{did_you_mean(sweep, names)}{_listed(names)}"
            )
        return table(_members(client, parent, _cells(_state(client, parent))), parents)


def find(source: str, uri: str) -> Source:
    """The sweep (name, execution, or `latest`) or experiment that a word means; a sweep before an experiment.

    `experiment:NAME` means the experiment where a sweep has the same name.

    Raises:
        TrackingError: there is none of this name (with the nearest), or the experiment was deleted.
    """
    store.check(uri)
    with store.errors(uri):
        client = store.client(uri)
        active = {str(one.name): str(one.experiment_id) for one in client.search_experiments()}
        if source.startswith(_EXPERIMENT):
            name = source.removeprefix(_EXPERIMENT)
            return Source(name, _experiment(client, uri, name))
        parents = _parents(client, list(active.values()))
        parent = _last_ended(parents) if source == LATEST else _parent(parents, source)
        if parent is not None:
            return Source(f"Sweep {parent.data.tags[_SWEEP]}", str(parent.info.experiment_id), parent)
        if source == LATEST and LATEST not in active:
            raise TrackingError(f"no sweep has ended in {uri}; run one (fedlora sweep demo), or name an experiment")
        if source in active or client.get_experiment_by_name(source) is not None:
            return Source(source, _experiment(client, uri, source))
        names = [*(name for run in parents for name in _names(run)), *active]
        raise TrackingError(f"no sweep or experiment '{source}' in {uri}.{did_you_mean(source, names)}{_listed(names)}")


def gather(source: str | Source, uri: str | None = None, task: str | None = None) -> Comparison:
    """Everything a report needs of a sweep (name, execution, or `latest`) or an experiment.

    Only finished runs are compared; of several with the same configuration the latest. The others are named in
    `excluded`, as are the failed and skipped cells of a sweep.

    Args:
        source: which.
        uri: the tracking store. None: as everywhere.
        task: the runs of it alone, where an experiment holds several (`judged.groups`).

    Raises:
        TrackingError: the store does not answer, or there is no such sweep or experiment.
        FedloraError: it holds runs that no one score compares and `task` chooses none, or no run of it.
    """
    where = store.resolve_uri(uri)
    found = find(source, where) if isinstance(source, str) else source
    with store.errors(where):
        client = store.client(where)
        state = {} if found.parent is None else _state(client, found.parent)
        cells = _cells(state)
        if found.parent is None:
            every = [run for run in store.search_runs(client, [found.experiment], "") if _SWEEP not in run.data.tags]
            parents = _parents(client, [found.experiment])
        else:
            parents = [found.parent]
            every = _members(client, found.parent, cells)
        known, excluded = _finished(every)
        kinds = judged.groups(known.values())
        finished = judged.one_kind(kinds, task, found.title)
        by = known[finished[0].info.run_id][1] if finished else Judged.by(RunConfig())
        comparison = Comparison(
            title=found.title,
            note=_note(found, state, task if len(kinds) > 1 else None),
            runs=table(finished, parents),
            rounds=_rounds(client, finished),
            excluded=excluded,
            roles=_roles(state),
            scores=by.scores,
            labelled=by.labelled,
        )
        comparison = _with_artifacts(client, comparison, finished)
    present = {run.info.run_id for run in every}
    missed = [_excluded(cell) for cell in cells if not (cell.finished and cell.run in present)]
    return replace(comparison, excluded=[*missed, *excluded])


def table(runs: Sequence[Any], parents: Iterable[Any] = ()) -> pd.DataFrame:
    """MLflow runs as `load` gives them.

    Args:
        runs: MLflow runs, in the order of the rows.
        parents: the sweeps' runs, for the column `sweep`.
    """
    sweeps = {run.info.run_id: _names(run)[0] for run in parents}
    rows = [_row(run, sweeps) for run in runs]
    found = pd.DataFrame(rows, columns=list(dict.fromkeys([*RUN_COLUMNS, *(key for row in rows for key in row)])))
    results = [column for column in found.columns if str(column).startswith(metrics.FINAL)]
    return found[[column for column in found.columns if column not in results] + sorted(results)]


def _row(run: Any, sweeps: dict[str, str]) -> dict[str, Any]:
    tags, params = run.data.tags, {key: _value(text) for key, text in sorted(run.data.params.items())}
    return {
        **{key: value for key, value in params.items() if key not in RUN_COLUMNS},
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "sweep": sweeps.get(tags.get(_PARENT, "")),
        "strategy": tags.get("strategy") or params.get("strategy"),
        "seed": params.get("seed"),
        "partition": tags.get("partition.hash"),
        "digest": tags.get("fedlora.config"),
        "started": pd.Timestamp(run.info.start_time, unit="ms", tz="UTC"),
        **{key: value for key, value in run.data.metrics.items() if key.startswith(metrics.FINAL)},
    }


def _value(text: str) -> Any:
    """A parameter as the number or truth value it was; lists and words stay text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) else text


def _experiment(client: MlflowClient, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        names = [str(one.name) for one in client.search_experiments()]
        raise TrackingError(f"no MLflow experiment '{name}' in {uri}.{did_you_mean(name, names)}{_listed(names)}")
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"MLflow experiment '{name}' was deleted; restore it (mlflow experiments restore -x {found.experiment_id})"
        )
    return str(found.experiment_id)


def _listed(names: Sequence[str], most: int = 8) -> str:
    known = list(dict.fromkeys(names))
    more = f", and {len(known) - most} more" if len(known) > most else ""
    return f" There are: {', '.join(known[:most])}{more}" if known else " There are none yet"


def _parents(client: MlflowClient, experiments: Sequence[str]) -> list[Any]:
    """The parent runs of sweeps, the latest first."""
    return store.search_runs(client, experiments, f"tags.`{_SWEEP}` LIKE '%'")


def _names(parent: Any) -> list[str]:
    """What a sweep's run may be called by: its execution, its name."""
    tags = parent.data.tags
    return [tags[name] for name in (_INSTANCE, _SWEEP) if tags.get(name)]


def _parent(parents: Sequence[Any], name: str) -> Any:
    """The latest sweep of a name, or the execution."""
    return next((run for run in parents if name in _names(run)), None)


def _last_ended(parents: Sequence[Any]) -> Any:
    ended = [run for run in parents if run.info.end_time]
    return max(ended, key=lambda run: run.info.end_time, default=None)


def _state(client: MlflowClient, parent: Any) -> dict[str, Any]:
    """A sweep's `sweep.json`; empty where it has none."""
    content = artifacts.read(client, parent.info.run_id, "sweep.json")
    return content if isinstance(content, dict) else {}


def _cells(state: Mapping[str, Any]) -> list[_Cell]:
    """The cells in a sweep's `sweep.json`."""
    cells = state.get("cells")
    return [
        _Cell(*(str(cell.get(key) or "") for key in _Cell._fields))
        for cell in (cells if isinstance(cells, list) else [])
        if isinstance(cell, dict)
    ]


def _members(client: MlflowClient, parent: Any, cells: Sequence[_Cell]) -> list[Any]:
    """The finished runs that a sweep's cells name, where they are still there; without cells, the parent's children."""
    if cells:
        named = (store.find_run(client, cell.run) for cell in cells if cell.finished)
        return [run for run in named if run is not None]
    return store.search_runs(client, [parent.info.experiment_id], store.children_of(parent.info.run_id))


def _finished(runs: Sequence[Any]) -> tuple[dict[str, tuple[Any, Judged]], list[Excluded]]:
    """The finished runs by id with what they are judged by, of equal configurations the latest, the first made first;
    and why others are left out."""
    kept: dict[str, tuple[Any, Judged]] = {}
    excluded = []
    for run in sorted(runs, key=lambda run: run.info.start_time, reverse=True):
        tags = run.data.tags
        name, digest = run.info.run_name or run.info.run_id, tags.get("fedlora.config") or run.info.run_id
        if run.info.status != "FINISHED":
            excluded.append(Excluded(name, run.info.status.lower(), _UNFINISHED.get(run.info.status, "")))
        elif "strategy" not in tags:
            excluded.append(Excluded(name, "foreign", "it is no federated run: it has no tag 'strategy'"))
        elif (by := judged.of(run)) is None:
            excluded.append(Excluded(name, "unknown task", f"task={run.data.params['task']} is not installed here"))
        elif digest in kept:
            excluded.append(Excluded(name, "repeated", f"the same configuration ran again later ({digest})"))
        else:
            kept[digest] = (run, by)
    return {run.info.run_id: (run, by) for run, by in reversed(kept.values())}, excluded


def _excluded(cell: _Cell) -> Excluded:
    if cell.finished:
        return Excluded(cell.label or "?", "gone", f"its MLflow run {cell.run} was deleted")
    return Excluded(cell.label or "?", cell.status or "?", cell.reason)


def _rounds(client: MlflowClient, runs: Sequence[Any]) -> pd.DataFrame:
    rows = [
        {"run_id": run_id, "round": record.round, **record.metrics}
        for run_id, records in history.many(client, runs).items()
        for record in records
    ]
    return pd.DataFrame(rows, columns=list(dict.fromkeys(["run_id", "round", *(key for row in rows for key in row)])))


def _with_artifacts(client: MlflowClient, comparison: Comparison, runs: Sequence[Any]) -> Comparison:
    """The same with what is kept as files; each partition is read once."""
    holders = {run.data.tags.get("partition.hash"): run.info.run_id for run in runs}
    wanted = [(run.info.run_id, path) for run in runs for path in (_DIVERGENCE, _CLIENTS, _CONFIG)]
    wanted += [(run_id, _PARTITION) for digest, run_id in holders.items() if digest]
    wanted += [(run.info.run_id, _ANSWERS) for run in runs if _ANSWERS in run.data.tags.get(_LOGGED, "")]
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        contents = dict(zip(wanted, threads.map(lambda pair: artifacts.read(client, *pair), wanted), strict=True))
    configs = {run: content for (run, path), content in contents.items() if path == _CONFIG}
    return replace(
        comparison,
        modules=frames.only_compared(artifacts.stacked(contents, _DIVERGENCE), comparison.rounds),
        clients=artifacts.stacked(contents, _CLIENTS),
        answers=artifacts.stacked({key: artifacts.rows(content) for key, content in contents.items()}, _ANSWERS),
        partitions={
            digest: contents[run_id, _PARTITION]
            for digest, run_id in holders.items()
            if digest and isinstance(contents[run_id, _PARTITION], dict)
        },
        configs={run: configfile.flatten(content) for run, content in configs.items() if isinstance(content, dict)},
    )


def _roles(state: Mapping[str, Any]) -> Roles:
    """What the sweep's file says of its settings."""
    told = state.get("compare")
    lists = [told.get(name) if isinstance(told, dict) else None for name in ("choices", "conditions")]
    return Roles(*(tuple(map(str, keys)) if isinstance(keys, list) else () for keys in lists))


def _note(source: Source, state: Mapping[str, Any], task: str | None) -> str:
    """A sentence or two on what was asked for."""
    if source.parent is None:
        of_task = f" with task={task}" if task else ""
        return f"The finished runs of the MLflow experiment {source.title}{of_task}."
    said = []
    for key, values in _mapping(state, "grid").items():
        listed = ", ".join(_plain(value) for value in values) if isinstance(values, list) else _plain(values)
        said.append(f"{key}: {listed}")
    common = " ".join(f"{key}={_plain(value)}" for key, value in _mapping(state, "set").items())
    base = f"from {Path(str(state['base'])).name}" if state.get("base") else ""
    start = " with ".join(filter(None, (base, common)))
    words = ("; ".join(said), start and f"each {start}", f"execution {source.instance}")
    return f"{'; '.join(filter(None, words))}."


def _mapping(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = state.get(name)
    return found if isinstance(found, dict) else {}


def _plain(value: Any) -> str:
    """A value as a person would write it."""
    return str(value) if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
