"""The server's side of a run in this process: updates come in, are combined, and rounds are closed.

What it has accepted and computed stays with it; it is read from the run folder only after a restart. Everything is in
the folder before it counts, and may be repeated without harm.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fedlora import metrics
from fedlora.adapter import Adapter
from fedlora.adapter.updates import Update, Updates
from fedlora.config import RunConfig
from fedlora.data.partition import Partition
from fedlora.errors import RunAborted
from fedlora.files.tensorfile import StoredTensors
from fedlora.metrics import Bytes, RoundRecord
from fedlora.objective import Score, Scores
from fedlora.run import inspection, participation, probe, ranks, rounds, rows
from fedlora.run.inspection import Accepted
from fedlora.run.participation import Ask, Entry, Roll
from fedlora.run.records import ClientRecord, Outcome, Part, total
from fedlora.run.runfolder import RunFolder
from fedlora.seeds import Turn
from fedlora.strategies import state as states
from fedlora.strategies.base import ServerState
from fedlora.strategies.step import step
from fedlora.training import memory
from fedlora.training.workers import use_threads

_IN_MEMORY = 2**28
"""Bytes of a round's uploads that are kept as they were read; those beyond live in their files, a module at a time, so
that memory does not grow with the number of clients."""
_SECONDS = {
    metrics.TIME_READ: "read_seconds",
    metrics.TIME_AGGREGATE: "seconds",
    metrics.TIME_DIVERGENCE: "divergence_seconds",
}
"""Metrics of the server's own work, and the fields of an `Outcome`."""


@dataclass(frozen=True)
class _Made:
    """What is needed of a round's new state when the round is closed."""

    round: int
    base_bytes: int
    ranks: Mapping[int, int]
    """Of clients that had not the highest, in the round."""
    outcome: Outcome | None
    """None before training."""


@dataclass(frozen=True)
class Timings:
    """Wall time of the phases of a round, in seconds; what the server does between them it times itself."""

    train: float = 0.0
    evaluate: float = 0.0
    round: float = 0.0
    resumed: bool = False
    """Whether another process had begun the round, so that these are the seconds of what was left of it."""


class Server:
    """Who receives, combines and measures in one run."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._state: ServerState | None = None
        self._rolls: dict[int, Roll] = {}
        self._made: dict[int, _Made] = {}
        self._closed: dict[int, RoundRecord] = {}
        """By round, the last one alone."""
        self._accepted: dict[tuple[int, int], Accepted] = {}
        self._kept_bytes, self._read_seconds = 0, 0.0
        self._most_examples: Sequence[int] = ()

    def state(self, number: int) -> ServerState:
        """The strategy's state after a round (0: before training).

        Raises:
            RunFolderError: it is missing or damaged.
        """
        if self._state is None or self._state.round != number:
            with self._reading():
                self._state = self.run.read_state(number)
        return self._state

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What is done within are seconds of the round's reading."""
        begun = time.perf_counter()
        yield
        self._read_seconds += time.perf_counter() - begun

    def receive(self, ask: Ask, failed: Mapping[int, str]) -> Roll:
        """Take in what the clients of an attempt have sent; each update is verified once, and kept.

        Args:
            ask: who was asked.
            failed: why clients could not train, by client.
        """
        roll = participation.receive(self.run, ask, failed, self.state(ask.round - 1), self._inspect)
        self._rolls = {ask.round: roll}
        return roll

    def _roll(self, number: int) -> Roll:
        if number not in self._rolls:
            self._rolls = {number: participation.read(self.run, number)}
        return self._rolls[number]

    def _inspect(self, turn: Turn, start: Adapter) -> str:
        with self._reading():
            accepted = inspection.inspect(self.run, turn, start, self._most(turn.client), self._has_room())
        return self._keep(turn.round, accepted).digest

    def _has_room(self) -> bool:
        return self._kept_bytes < _IN_MEMORY

    def _keep(self, number: int, accepted: Accepted) -> Accepted:
        if self._has_room():
            self._kept_bytes += sum(tensor.nbytes for tensor in accepted.adapter.tensors().values())
        self._accepted[number, accepted.record.client] = accepted
        return accepted

    def _most(self, client: int) -> int:
        """Examples that a client can have trained on."""
        self._most_examples = self._most_examples or Partition.load(self.run.path / "partition.npz").sizes
        return sum(self._most_examples) if self.run.strategy.traits.pools_data else self._most_examples[client]

    def aggregate(self, number: int) -> Outcome:
        """Combine the updates that round `number` has accepted, save the new state, and measure the divergence of its
        broadcast. The clients' weights add up to one over those who completed.

        Raises:
            RunAborted: an update is missing, or was damaged after it was accepted.
        """
        run, config = self.run, self.run.config
        if record := run.read_record(run.state_stem(number)):
            return Outcome.from_json(record)
        use_threads(config.runner.threads)
        state, roll = self.state(number - 1), self._roll(number)
        with self._reading():
            accepted = [self._of(number, entry) for entry in roll.having("completed")]
        sent = (Update(each.record.client, _weight(config, each.record), each.adapter) for each in accepted)
        updates = Updates.collect(sent, "uniform" if config.weighting == "uniform" else "examples")
        with memory.watched("cpu") as peak:
            made = step(run.strategy, state, updates, config.lora.truncation == "svd")
        probe.prepare(run, number, state, updates)
        validation = {each.record.client: each.record.validation.loss for each in accepted if each.record.validation}
        risen = ranks.after_round(config.lora, number, validation, config.clients)
        crossed = total([*(each.record.bytes for each in accepted), *(entry.bytes for entry in roll.entries)])
        times = (self._read_seconds, made.seconds, made.divergence_seconds)
        outcome = Outcome(made.divergence, crossed, *times, memory=peak.bytes)
        # As it is read again: it may hold uploads that live in files, which are removed before it is let go.
        new = states.as_stored(replace(made.state, ranks={**made.state.ranks, **risen}))
        run.write_state(new, outcome.to_json())
        self._state = new
        self._made = {number: _Made(number, new.base_step.wire_bytes(), state.ranks, outcome)}
        return outcome

    def _of(self, number: int, entry: Entry) -> Accepted:
        """An update that was accepted when it arrived; after a restart the same files, by their digest."""
        known = self._accepted.get((number, entry.client))
        if known is not None and known.digest == entry.digest:
            return known
        stem = self.run.client_stem(number, entry.client)
        record = self.run.read_record(stem)
        if record is None or record["digest"] != entry.digest:
            raise RunAborted(
                f"the update of client {entry.client} in round {number} is missing or was damaged after it was "
                f"accepted; `fedlora resume {self.run.path}` has the client train again"
            )
        stored = StoredTensors(self.run.path / f"{stem}.safetensors")
        adapter = Adapter.from_tensors(dict(stored.items())) if self._has_room() else Adapter.stored(stored)
        said = ClientRecord.from_json(record, self.run.objective.scores)
        return self._keep(number, Accepted(said, record["digest"], adapter))

    def close(self, number: int, parts: Sequence[Part], scores: Sequence[Scores], timings: Timings) -> RoundRecord:
        """Gather a round's metrics and close it: `record.json` is the mark that it is complete.

        Args:
            number: of the round.
            parts: what was scored (`rounds.evaluation_parts`).
            scores: of each part.
            timings: of the round.

        Raises:
            RunAborted: something of the round is missing.
        """
        values: dict[str, float] = {}
        roll, made, score = self._roll(number), self._of_state(number), self.run.score
        of_all: list[Scores] = []
        by_client: list[Scores] = []
        for part, found in zip(parts, scores, strict=True):
            if part.split == "probe":
                values |= {part.metric: found.values()[score.name]} if score.name in found.values() else {}
            else:
                (by_client if part.split == "local" else of_all).append(found)
        answers: list[Mapping[str, Any]] = []
        if of_all:
            whole = sum(of_all[1:], of_all[0])
            values |= metrics.of_global(whole)
            answers = sorted(whole.answers, key=lambda row: row["row"])
        records = {entry.client: self._of(number, entry).record for entry in roll.having("completed")}
        if made.outcome is None:
            values |= self._of_clients(by_client) | metrics.of_bytes(Bytes(), 0)
            values |= dict.fromkeys(_SECONDS, 0.0)
        else:
            values |= self._of_training(number, roll, records, made.outcome)
        for each in self.run.objective.locally(self.run.config):
            values |= metrics.gap(values, each)
        values |= {
            metrics.TIME_TRAIN: timings.train,
            metrics.TIME_EVALUATE: timings.evaluate,
            metrics.TIME_ROUND: timings.round,
            **({metrics.TIME_RESUMED: 1.0} if timings.resumed else {}),
        }
        record = RoundRecord(number, int(time.time() * 1000), tuple(roll.completed), values)
        kept = _kept(roll, records, made, score)
        kept["rows"] |= {"answers": [{"round": number, **row} for row in answers]} if answers else {}
        self.run.write_json(self.run.record_name(number), {**record.to_json(), **kept})
        self._accepted, self._kept_bytes, self._read_seconds = {}, 0, 0.0
        self._closed = {number: record}
        return record

    def _of_state(self, number: int) -> _Made:
        """What came of a round, as it was made here, or is read after a restart."""
        if number in self._made:
            return self._made[number]
        content = self.run.need_json(f"{self.run.state_stem(number)}.json")
        if number == 0:
            return _Made(0, content["base_bytes"], {}, None)
        before = self.run.need_json(f"{self.run.state_stem(number - 1)}.json")["state"]["ranks"]
        ranks = {int(client): rank for client, rank in before.items()}
        return _Made(number, content["base_bytes"], ranks, Outcome.from_json(content))

    def _of_clients(self, scores: Sequence[Scores]) -> dict[str, float]:
        values: dict[str, float] = {}
        for each in self.run.objective.locally(self.run.config):
            values |= metrics.of_local(scores, each)
        return values

    def _of_training(
        self, number: int, roll: Roll, records: Mapping[int, ClientRecord], outcome: Outcome
    ) -> dict[str, float]:
        before = self._closed.get(number - 1) or rounds.read_record(self.run, number - 1)
        if before is None:
            raise RunAborted(f"round {number} in {self.run.path} is incomplete")
        virtual = {}
        if self.run.config.channel.faults.delay != "none":
            virtual[metrics.TIME_VIRTUAL] = participation.virtual_seconds(self.run.config, roll)
        return (
            self._of_clients([record.local for record in records.values() if record.local is not None])
            | metrics.of_divergence(outcome.divergence)
            | metrics.of_bytes(outcome.bytes, before.metrics[metrics.BYTES_TOTAL])
            | metrics.of_participation(roll.counts())
            | metrics.of_memory([record.memory for record in records.values()], outcome.memory)
            | {name: value for name, key in _SECONDS.items() if (value := getattr(outcome, key)) is not None}
            | virtual
        )


def _weight(config: RunConfig, record: ClientRecord) -> int:
    """Of a client, before it is a share; that it says one has been looked at (`inspection`)."""
    return (record.tokens or 0) if config.weighting == "tokens" else record.examples


def _kept(roll: Roll, records: Mapping[int, ClientRecord], made: _Made, score: Score) -> dict[str, Any]:
    """What is needed of a round when its uploads and state are gone: rows of the tables, who was asked (at which rank,
    where it was not the highest), base bytes."""
    asked = sorted({entry.client for entry in roll.entries})
    divergence = made.outcome.divergence.to_json() if made.outcome else {}
    return {
        "asked": asked,
        "ranks": {str(client): made.ranks[client] for client in asked if client in made.ranks},
        "base_bytes": made.base_bytes,
        "rows": {
            "clients": rows.of_clients(made.round, roll, records, score),
            "divergence": rows.of_divergence(made.round, divergence),
        },
    }
