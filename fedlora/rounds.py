"""The server's side of a round: who takes part, what comes of their uploads, what is measured.

Everything here reads from and writes to the run folder and may be repeated without harm.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedlora import metrics, seeds
from fedlora.adapter import Adapter
from fedlora.divergence import Divergence, measure
from fedlora.errors import RunAborted
from fedlora.evaluation import Scores
from fedlora.metrics import Bytes, RoundRecord
from fedlora.runfolder import RunFolder
from fedlora.strategies import registry
from fedlora.strategies.base import advance
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
    generator = seeds.numpy_generator(config.seed, "select", number)
    return sorted(generator.choice(config.clients, config.clients_per_round, replace=False).tolist())


def remaining(run: RunFolder) -> range:
    """The rounds that are not finished; round 0 (evaluation before training) is done apart."""
    return range(max(len(run.finished_rounds()), 1), run.config.rounds + 1)


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
    uploads = [_upload(run, number, client, state.adapter) for client in clients]
    updates = Updates.collect(
        (Update(c, record["examples"], adapter) for c, record, adapter in zip(clients, records, uploads, strict=True)),
        config.weighting,
    )
    begun = time.perf_counter()
    new = advance(strategy, state, updates)
    aggregated = time.perf_counter()
    mixing = {module: values["p"] for module, values in new.diagnostics.items() if "p" in values}
    divergence = measure(updates, [strategy.broadcast(new, client) for client in updates.clients], mixing)
    return run.write_state(
        new,
        {
            "clients": list(clients),
            "divergence": divergence.to_json(),
            "bytes": asdict(_total_bytes(record["bytes"] for record in records)),
            "seconds": aggregated - begun,
            "divergence_seconds": time.perf_counter() - aggregated,
        },
    )


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
    adapter.check_like(like, f"client {client}, round {number}")
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
        return []
    personal = registry.make(config.strategy, config.strategy_options).personal
    examples = run.need_json("setup.json")["examples"]["test"]
    step = config.clients if personal else math.ceil(examples / _LARGEST_PART)
    parts: list[dict[str, Any]] = [
        {"split": "global", "client": index if personal else None, "start": index, "step": step}
        for index in range(min(step, examples))
    ]
    if number == 0 and config.evaluation.local:
        parts += [{"split": "local", "client": client} for client in range(config.clients)]
    return parts


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
