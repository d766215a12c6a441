"""The server's side of a round: who takes part, what comes of their uploads, what is measured.

Everything here reads from and writes to the run folder and may be repeated without harm.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedlora import metrics, probe, ranks, seeds
from fedlora.adapter import Adapter
from fedlora.config import TrainingConfig
from fedlora.data.batches import steps_for
from fedlora.data.partition import Partition
from fedlora.data.partitioners import Rows
from fedlora.divergence import Divergence, measure
from fedlora.errors import RunAborted
from fedlora.evaluation import Scores
from fedlora.metrics import Bytes, RoundRecord
from fedlora.runfolder import RunFolder
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState, Strategy, advance
from fedlora.updates import Update, Updates

_LARGEST_PART = 1000
"""Test examples per evaluation part; fixed, so that scores do not depend on the number of workers."""


@dataclass(frozen=True)
class Timings:
    """Wall time of the phases of a round, in seconds."""

    train: float = 0.0
    aggregate: float = 0.0
    evaluate: float = 0.0
    round: float = 0.0


def select(run: RunFolder, number: int) -> list[int]:
    """The clients of round `number`, drawn without replacement by (seed, round)."""
    config = run.config
    if registry.find(config.strategy).pools_data:
        return [0]
    generator = seeds.numpy_generator(config.seed, "select", number)
    return sorted(generator.choice(config.clients, config.clients_per_round, replace=False).tolist())


def unfinished(run: RunFolder) -> list[int]:
    """The rounds still to do, from 0, the evaluation before training."""
    return list(range(len(run.finished_rounds()), run.config.rounds + 1))


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


def missed_base(run: RunFolder, number: int, client: int) -> int:
    """Bytes of base update that a client downloads at the start of round `number`.

    All that was added since it last took part, or the whole update where that is smaller.
    """
    total = int(run.need_json(f"{run.state_stem(number - 1)}.json")["base_total_bytes"])
    if not total:
        return 0
    took_part = (t for t in range(number - 1, 0, -1) if run.read_json(f"{run.client_stem(t, client)}.json"))
    last = next(took_part, 1)
    steps = (run.need_json(f"{run.state_stem(t)}.json") for t in range(last, number))
    return min(sum(int(step["base_bytes"]) for step in steps), total)


def aggregate(run: RunFolder, number: int, clients: Sequence[int]) -> dict[str, Any]:
    """Combine the uploads of round `number`, save the new state, and measure the divergence of its broadcast.

    Returns the record: `divergence` by module, `bytes`, `seconds` (aggregation alone) and `divergence_seconds`.

    Raises:
        RunAborted: an upload is missing or damaged.
        AdapterError: an upload does not have the shape of the broadcast, or has non-finite values.
    """
    if record := run.read_record(run.state_stem(number)):
        return record
    config = run.config
    strategy = registry.make(config.strategy, config.strategy_options)
    state = run.read_state(number - 1)
    records = [client_record(run, number, client) for client in clients]
    uploads = [_upload(run, number, client, strategy.broadcast(state, client)) for client in clients]
    updates = Updates.collect(
        (Update(c, record["examples"], adapter) for c, record, adapter in zip(clients, records, uploads, strict=True)),
        config.weighting,
    )
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
            "clients": list(clients),
            "divergence": divergence.to_json(),
            "bytes": asdict(_total_bytes(record["bytes"] for record in records)),
            "seconds": aggregated - begun,
            "divergence_seconds": measured - aggregated,
        },
    )


def measure_round(strategy: Strategy, new: ServerState, updates: Updates) -> Divergence:
    """The divergence of what the clients of a round will hold, from the state after it."""
    mixing = {module: values["p"] for module, values in new.diagnostics.items() if "p" in values}
    broadcasts = _folded([strategy.broadcast(new, client) for client in updates.clients])
    return measure(updates.folded(), broadcasts, mixing, new.base_step, new.scaling)


def _folded(broadcasts: Sequence[Adapter]) -> list[Adapter]:
    """The same as plain factors; what is sent to all is folded once, so that it is seen to be one broadcast."""
    distinct = {id(sent.cores): sent for sent in broadcasts if sent.cores}
    folded = {key: sent.folded() for key, sent in distinct.items()}
    return [folded.get(id(sent.cores), sent) for sent in broadcasts]


def client_record(run: RunFolder, number: int, client: int) -> dict[str, Any]:
    """A client's record of a round.

    Raises:
        RunAborted: it is not there or damaged.
    """
    record = run.read_record(run.client_stem(number, client))
    if record is None:
        raise RunAborted(f"the update of client {client} in round {number} is missing or damaged in {run.path}")
    return record


def _upload(run: RunFolder, number: int, client: int, like: Adapter) -> Adapter:
    adapter = Adapter.from_tensors(run.read_tensors(run.client_stem(number, client)))
    adapter.check_like(like, f"client {client}, round {number}", lower_rank=True)
    return adapter


def _total_bytes(parts: Iterable[dict[str, int]]) -> Bytes:
    total = dict.fromkeys(asdict(Bytes()), 0)
    for part in parts:
        total = {name: total[name] + part[name] for name in total}
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
    clients: Sequence[int],
    parts: Sequence[dict[str, Any]],
    scores: Sequence[dict[str, Any]],
    timings: Timings,
) -> RoundRecord:
    """Gather a round's metrics and close it: `record.json` is the mark that it is complete."""
    values: dict[str, float] = {}
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
    else:
        values |= _of_training(run, number, clients)
    values |= metrics.gap(values)
    values |= {
        metrics.TIME_TRAIN: timings.train,
        metrics.TIME_AGGREGATE: timings.aggregate,
        metrics.TIME_EVALUATE: timings.evaluate,
        metrics.TIME_ROUND: timings.round,
    }
    record = RoundRecord(number, int(time.time() * 1000), tuple(clients), values)
    run.write_json(run.record_name(number), record.to_json())
    return record


def _of_training(run: RunFolder, number: int, clients: Sequence[int]) -> dict[str, float]:
    outcome = run.read_record(run.state_stem(number))
    before = read_record(run, number - 1)
    if outcome is None or before is None:
        raise RunAborted(f"round {number} in {run.path} is incomplete")
    local = [client_record(run, number, client)["local"] for client in clients]
    return (
        metrics.of_local([Scores.from_json(content) for content in local if content is not None])
        | metrics.of_divergence(Divergence.from_json(outcome["divergence"]))
        | metrics.of_bytes(Bytes(**outcome["bytes"]), before.metrics[metrics.BYTES_TOTAL])
        | {metrics.CLIENTS_SELECTED: len(clients), metrics.CLIENTS_COMPLETED: len(outcome["clients"])}
    )


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
