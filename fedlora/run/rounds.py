"""The server's side of a round: what comes of the uploads, what is measured, how it is closed.

Everything here reads from and writes to the run folder and may be repeated without harm.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedlora import metrics
from fedlora.adapter import Adapter
from fedlora.adapter.divergence import Divergence
from fedlora.adapter.updates import Update, Updates
from fedlora.config import RunConfig, TrainingConfig
from fedlora.data.batches import steps_for
from fedlora.data.partition import Partition
from fedlora.data.partitioners import Rows
from fedlora.errors import RunAborted
from fedlora.files.tensorfile import read_tensors
from fedlora.metrics import Bytes, RoundRecord
from fedlora.run import participation, probe, ranks, rows
from fedlora.run.participation import Entry, Roll
from fedlora.run.runfolder import RunFolder
from fedlora.strategies import registry
from fedlora.strategies.base import Strategy
from fedlora.strategies.step import advance, measure_round
from fedlora.training.evaluation import Scores
from fedlora.training.workers import use_threads

_SERVER_SECONDS = {
    metrics.TIME_READ: "read_seconds",
    metrics.TIME_AGGREGATE: "seconds",
    metrics.TIME_DIVERGENCE: "divergence_seconds",
}
"""Metrics of the server's own work, and their names in the record of a state."""
_LARGEST_PART = 1000
"""Test examples per evaluation part; fixed, so that scores do not depend on the number of workers."""


@dataclass(frozen=True)
class Timings:
    """Wall time of the phases of a round, in seconds; what the server does between them it times itself."""

    train: float = 0.0
    evaluate: float = 0.0
    round: float = 0.0
    resumed: bool = False
    """Whether another process had begun the round, so that these are the seconds of what was left of it."""


def unfinished(run: RunFolder) -> list[int]:
    """The rounds still to do, from 0, the evaluation before training."""
    return list(range(len(run.finished_rounds()), run.config.rounds + 1))


def begun(run: RunFolder, number: int) -> bool:
    """Whether something of a round's training is there already. Round 0 only scores, and is scored anew."""
    folder = run.round_folder(number)
    return number > 0 and folder.is_dir() and any(folder.iterdir())


@dataclass(frozen=True)
class Examples:
    """The rows that a client trains and is tested on, and how many clients' data that is, with their sizes."""

    train: Rows
    test: Rows
    sizes: tuple[int, ...]

    def training(self, training: TrainingConfig) -> TrainingConfig:
        """How it trains: on everybody's data, as many steps as one client takes on average."""
        if len(self.sizes) == 1 or training.local_epochs is None:
            return training
        each = [steps_for(size, training.batch_size, None, training.local_epochs) for size in self.sizes]
        return training.model_copy(update={"local_steps": round(sum(each) / len(each)), "local_epochs": None})


def examples_of(strategy: Strategy, partition: Partition, client: int) -> Examples:
    """A client's own rows, or everybody's where the strategy pools the data."""
    if not strategy.pools_data:
        return Examples(partition.train[client], partition.test[client], (len(partition.train[client]),))
    train, test = (np.unique(np.concatenate(parts)) for parts in (partition.train, partition.test))
    return Examples(train, test, partition.sizes)


def aggregate(run: RunFolder, number: int) -> dict[str, Any]:
    """Combine the updates that round `number` has accepted, save the new state, and measure the divergence of its
    broadcast. The clients' weights add up to one over those who completed.

    Returns the record: `divergence` by module, `bytes`, and what took how long: `read_seconds` (state and updates),
    `seconds` (aggregation alone), `divergence_seconds`.

    Raises:
        RunAborted: an update is missing, or was damaged after it was accepted.
    """
    if record := run.read_record(run.state_stem(number)):
        return record
    config = run.config
    use_threads(config.runner.threads)
    strategy = registry.make(config.strategy, config.strategy_options)
    opened = time.perf_counter()
    state = run.read_state(number - 1)
    roll = participation.read(run, number)
    accepted = [_accepted(run, number, entry) for entry in roll.having("completed")]
    records = [record for record, _ in accepted]
    updates = Updates.collect((Update(r["client"], r["examples"], a) for r, a in accepted), config.weighting)
    begun = time.perf_counter()
    new = advance(strategy, state, updates, config.lora.truncation == "svd")
    aggregated = time.perf_counter()
    divergence = measure_round(strategy, new, updates)
    measured = time.perf_counter()
    probe.prepare(run, number, state, updates)
    validation = {r["client"]: Scores.from_json(r["validation"]).loss for r in records if r["validation"]}
    risen = ranks.after_round(config.lora, number, validation, config.clients)
    return run.write_state(
        replace(new, ranks={**new.ranks, **risen}),
        {
            "divergence": divergence.to_json(),
            "bytes": asdict(_total_bytes([*(r["bytes"] for r in records), *(e.bytes for e in roll.entries)])),
            "read_seconds": begun - opened,
            "seconds": aggregated - begun,
            "divergence_seconds": measured - aggregated,
        },
    )


def _client_record(run: RunFolder, number: int, client: int) -> dict[str, Any]:
    record = run.read_json(f"{run.client_stem(number, client)}.json")
    if record is None:
        raise RunAborted(f"the record of client {client} in round {number} is missing or damaged in {run.path}")
    return dict(record)


def _accepted(run: RunFolder, number: int, entry: Entry) -> tuple[dict[str, Any], Adapter]:
    """The record and the adapter of an update that was accepted when it arrived: the same file, by its digest."""
    stem = run.client_stem(number, entry.client)
    record = run.read_record(stem)
    if record is None or record["digest"] != entry.digest:
        raise RunAborted(
            f"the update of client {entry.client} in round {number} is missing or was damaged after it was accepted; "
            f"`fedlora resume {run.path}` has the client train again"
        )
    return record, Adapter.from_tensors(read_tensors(run.path / f"{stem}.safetensors"))


def _total_bytes(parts: Iterable[Mapping[str, int]]) -> Bytes:
    total = dict.fromkeys(asdict(Bytes()), 0)
    for part in parts:
        total = {name: total[name] + part.get(name, 0) for name in total}
    return Bytes(**total)


def evaluation_parts(run: RunFolder, number: int) -> list[dict[str, Any]]:
    """What must be scored after round `number`: the test set in fixed parts, and before training each client's own.

    A personal strategy has no global model: the test examples are dealt out evenly, and each is judged by one client's
    model, an unbiased estimate of the clients' mean accuracy at the price of one pass (our reading).
    """
    config = run.config
    if number not in (0, config.rounds) and number % config.evaluation.every:
        return probe.parts(run, number)
    personal = registry.make(config.strategy, config.strategy_options).personal
    examples = run.need_json("setup.json")["examples"]["test"]
    step = config.clients if personal else math.ceil(examples / _LARGEST_PART)
    parts: list[dict[str, Any]] = [
        {"split": "global", "client": index if personal else None, "start": index, "step": step}
        for index in range(min(step, examples))
    ]
    if number == 0 and config.evaluation.local:
        parts += [{"split": "local", "client": client} for client in range(config.clients)]
    return parts + probe.parts(run, number)


def finish(
    run: RunFolder,
    number: int,
    parts: Sequence[dict[str, Any]],
    scores: Sequence[dict[str, Any]],
    timings: Timings,
) -> RoundRecord:
    """Gather a round's metrics and close it: `record.json` is the mark that it is complete."""
    values: dict[str, float] = {}
    roll = participation.read(run, number)
    by_split: dict[str, list[Scores]] = {"global": [], "local": []}
    for part, content in zip(parts, scores, strict=True):
        if part["split"] == "probe":
            values[part["metric"]] = Scores.from_json(content).accuracy
        else:
            by_split[part["split"]].append(Scores.from_json(content))
    if by_split["global"]:
        values |= metrics.of_global(_sum(by_split["global"]))
    if number == 0:
        values |= metrics.of_local(by_split["local"]) | metrics.of_bytes(Bytes(), 0)
        values |= dict.fromkeys(_SERVER_SECONDS, 0.0)
    else:
        values |= _of_training(run, number, roll)
    values |= metrics.gap(values)
    values |= {
        metrics.TIME_TRAIN: timings.train,
        metrics.TIME_EVALUATE: timings.evaluate,
        metrics.TIME_ROUND: timings.round,
        **({metrics.TIME_RESUMED: 1.0} if timings.resumed else {}),
    }
    record = RoundRecord(number, int(time.time() * 1000), tuple(roll.completed), values)
    run.write_json(run.record_name(number), {**record.to_json(), **_kept(run, number, roll)})
    return record


def _kept(run: RunFolder, number: int, roll: Roll) -> dict[str, Any]:
    """What is needed of a round when its uploads and state are gone: rows of the tables, who was asked (at which rank,
    where it was not the highest), base bytes."""
    outcome = run.need_json(f"{run.state_stem(number)}.json")
    asked = sorted({entry.client for entry in roll.entries})
    lower = run.need_json(f"{run.state_stem(number - 1)}.json")["state"]["ranks"] if asked else {}
    return {
        "asked": asked,
        "ranks": {str(client): lower[str(client)] for client in asked if str(client) in lower},
        "base_bytes": outcome["base_bytes"],
        "rows": {
            "clients": rows.of_clients(run, number, roll),
            "divergence": rows.of_divergence(number, outcome.get("divergence", {})),
        },
    }


def _of_training(run: RunFolder, number: int, roll: Roll) -> dict[str, float]:
    outcome = run.read_record(run.state_stem(number))
    before = read_record(run, number - 1)
    if outcome is None or before is None:
        raise RunAborted(f"round {number} in {run.path} is incomplete")
    local = [_client_record(run, number, client)["local"] for client in roll.completed]
    return (
        metrics.of_local([Scores.from_json(content) for content in local if content is not None])
        | metrics.of_divergence(Divergence.from_json(outcome["divergence"]))
        | metrics.of_bytes(Bytes(**outcome["bytes"]), before.metrics[metrics.BYTES_TOTAL])
        | metrics.of_participation(roll.counts())
        | {name: outcome[key] for name, key in _SERVER_SECONDS.items() if key in outcome}
        | _virtual(run.config, roll)
    )


def _virtual(config: RunConfig, roll: Roll) -> dict[str, float]:
    if config.channel.faults.delay == "none":
        return {}
    return {metrics.TIME_VIRTUAL: participation.virtual_seconds(config, roll)}


def _sum(scores: Sequence[Scores]) -> Scores:
    total = scores[0]
    for other in scores[1:]:
        total = total + other
    return total


def read_record(run: RunFolder, number: int) -> RoundRecord | None:
    """The record of a finished round."""
    content = run.read_json(run.record_name(number))
    return RoundRecord.from_json(content) if content else None


def records(run: RunFolder) -> list[RoundRecord]:
    """The records of all finished rounds, in order."""
    found = (read_record(run, number) for number in run.finished_rounds())
    return [record for record in found if record is not None]
