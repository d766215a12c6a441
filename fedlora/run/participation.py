"""Who takes part in a round: who is asked, what became of each, and whether those who completed are enough.

The answers are in the round's `roll.json`, so that a run that was interrupted goes on with the same clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Literal

from fedlora import seeds
from fedlora.adapter import Adapter
from fedlora.adapter.base_update import BaseUpdate
from fedlora.channel import faults as channel
from fedlora.config import RunConfig
from fedlora.errors import RunAborted, UpdateRejected, counted, listed
from fedlora.metrics import Bytes
from fedlora.run.runfolder import RunFolder
from fedlora.run.traffic import crossing, due
from fedlora.seeds import Turn
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState

Status = Literal["completed", "crashed", "late", "surplus", "rejected", "failed"]
"""`crashed`: sent nothing (a fault made on purpose); `late`: after the deadline; `surplus`: not needed any more, of an
over-selected round; `rejected`: its update is not what was asked for; `failed`: its training diverged, or its worker
died more often than it may."""


_NAMED = 20
"""Clients, or ranges of them, that a line names."""


@dataclass(frozen=True)
class Entry:
    """What became of a client that was asked."""

    client: int
    attempt: int
    status: Status
    reason: str | None = None
    delay_s: float = 0.0
    """Virtual seconds until its update arrived."""
    digest: str | None = None
    """Of the update that was accepted."""
    bytes: Bytes = field(default_factory=Bytes)
    """What crossed the wire in vain."""


@dataclass(frozen=True)
class Roll:
    """All who were asked in a round, in the order of attempts and clients."""

    entries: tuple[Entry, ...] = ()

    @property
    def completed(self) -> list[int]:
        """The clients whose updates are used, in order."""
        return sorted(entry.client for entry in self.entries if entry.status == "completed")

    @property
    def attempts(self) -> int:
        """How often the round has asked."""
        return 1 + max((entry.attempt for entry in self.entries), default=-1)

    def counts(self) -> dict[str, int]:
        """How many requests ended in which way; a client that was asked twice counts twice."""
        return dict(Counter(entry.status for entry in self.entries))

    def having(self, status: Status) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == status]

    def told(self, ask: Ask) -> str:
        """A line about those of an attempt who did not complete; empty where all did."""
        missing = [entry for entry in self.entries if entry.attempt == ask.attempt and entry.status != "completed"]
        if not missing:
            return ""
        by_status: dict[str, list[Entry]] = {}
        for entry in missing:
            by_status.setdefault(entry.status, []).append(entry)
        parts = [_summary(status, entries) for status, entries in by_status.items()]
        again = f" (attempt {ask.attempt + 1})" if ask.attempt else ""
        done = len(ask.clients) - len(missing)
        return (
            f"round {ask.round}{again}: {done} of {counted(len(ask.clients), 'client')} completed; {'; '.join(parts)}"
        )


@dataclass(frozen=True)
class Ask:
    """The clients that a round asks in one attempt."""

    round: int
    attempt: int
    clients: tuple[int, ...]


def _summary(status: str, entries: Sequence[Entry]) -> str:
    """`crashed: 2, 5`, with the first reason where it is not in the word."""
    said = f"{status}: {listed([entry.client for entry in entries], most=_NAMED)}"
    return f"{said} ({entries[0].reason})" if status in ("rejected", "failed") else said


def read(run: RunFolder, number: int) -> Roll:
    """The roll of a round; empty before anybody has answered."""
    content = run.read_json(run.roll_name(number))
    entries = content["entries"] if content else ()
    return Roll(tuple(Entry(**entry | {"bytes": Bytes(**entry["bytes"])}) for entry in entries))


def next_ask(run: RunFolder, number: int) -> Ask | None:
    """Whom the round asks next; None where enough have completed.

    Raises:
        RunAborted: too few have, and nobody else may be asked; says what became of them.
    """
    config, roll = run.config, read(run, number)
    if not roll.entries:
        return Ask(number, 0, tuple(drawn(config, number)))
    if len(roll.completed) >= config.channel.min_clients:
        return None
    others = _others(config, number, roll)
    if config.channel.too_few == "stop" or roll.attempts >= config.channel.attempts or not others:
        raise RunAborted(_too_few(config, number, roll))
    return Ask(number, roll.attempts, tuple(others))


def drawn(config: RunConfig, number: int) -> list[int]:
    """The clients that a round asks first, drawn without replacement by (seed, round)."""
    if registry.find(config.strategy).traits.pools_data:
        return [0]
    generator = seeds.numpy_generator(config.seed, "select", number)
    return sorted(generator.choice(config.clients, config.clients_asked, replace=False).tolist())


def _others(config: RunConfig, number: int, roll: Roll) -> list[int]:
    """As many more as are missing: clients not asked yet, and then those that may do better when asked again."""
    asked = {entry.client for entry in roll.entries}
    again = {entry.client for entry in roll.entries if entry.status != "failed"} - set(roll.completed)
    generator = seeds.numpy_generator(config.seed, f"select/{roll.attempts}", number)
    pools = registry.find(config.strategy).traits.pools_data
    unasked = [] if pools else generator.permutation(sorted(set(range(config.clients)) - asked)).tolist()
    wanted = config.clients_asked - len(roll.completed)
    return sorted([*unasked, *generator.permutation(sorted(again)).tolist()][:wanted])


def _too_few(config: RunConfig, number: int, roll: Roll) -> str:
    asked = {entry.client for entry in roll.entries}
    reasons = "; ".join(entry.reason or f"client {entry.client} {entry.status}" for entry in roll.entries)
    shown = reasons if len(reasons) <= 600 else f"{reasons[:600]} …"
    times = f" in {roll.attempts} attempts" if roll.attempts > 1 else ""
    return (
        f"round {number}: {len(roll.completed)} of {counted(len(asked), 'client')} "
        f"completed{times}, fewer than channel.min_clients={config.channel.min_clients}: {shown}"
    )


Inspect = Callable[[Turn, Adapter], str]
"""Looks at the update of a client that was sent an adapter, and takes it in; its digest. Raises UpdateRejected."""


def receive(run: RunFolder, ask: Ask, failed: Mapping[int, str], state: ServerState, inspect: Inspect) -> Roll:
    """Take in what the clients of an attempt have sent, in the order of arrival, until there are as many as a round
    needs; each is inspected before it counts.

    Args:
        run: where the updates are.
        ask: who was asked.
        failed: why clients could not train, by client.
        state: after the round before.
        inspect: an update.
    """
    before = read(run, ask.round)
    if before.attempts > ask.attempt:
        return before
    config = run.config
    missing = max(0, config.clients_per_round - len(before.completed))
    entries = []
    for turn, fate in _by_arrival(config, ask):
        start = run.strategy.broadcast(state, turn.client)
        if turn.client in failed:
            entry = Entry(turn.client, turn.attempt, "failed", failed[turn.client])
        else:
            entry = _taken(run, turn, fate, start, inspect, missing)
        missing -= entry.status == "completed"
        entries.append(entry if entry.status == "completed" else _with_bytes(run, state.base, start, turn, entry))
    roll = Roll(before.entries + tuple(sorted(entries, key=lambda entry: entry.client)))
    run.write_json(run.roll_name(ask.round), {"entries": [asdict(entry) for entry in roll.entries]})
    return roll


def _by_arrival(config: RunConfig, ask: Ask) -> list[tuple[Turn, channel.Fate]]:
    turns = [Turn(config.seed, ask.round, client, ask.attempt) for client in ask.clients]
    fates = [(turn, channel.fate(config, turn)) for turn in turns]
    return sorted(fates, key=lambda pair: (pair[1].delay_s, pair[1].place, pair[0].client))


def _taken(run: RunFolder, turn: Turn, fate: channel.Fate, start: Adapter, inspect: Inspect, missing: int) -> Entry:
    """What becomes of a client that could train."""
    at = partial(Entry, turn.client, turn.attempt, delay_s=fate.delay_s)
    deadline = run.config.channel.deadline_s
    if fate.crashes:
        return Entry(turn.client, turn.attempt, "crashed", f"{turn}: dropped out (channel.faults.crash)")
    if not fate.arrives(deadline):
        late = f"{turn}: arrived after {fate.delay_s:.3g} virtual s, channel.deadline_s is {deadline:g}"
        return at("late", reason=late)
    if not missing:
        return at("surplus", reason=f"{turn}: enough had arrived before")
    try:
        return at("completed", digest=inspect(turn, start))
    except UpdateRejected as error:
        _put_aside(run, turn)
        return at("rejected", reason=str(error))


def _put_aside(run: RunFolder, turn: Turn) -> None:
    """Rename a rejected update, for people to look at: when the client is asked again, it trains again."""
    stem = run.path / run.client_stem(turn.round, turn.client)
    for suffix in (".json", ".safetensors"):
        file = stem.with_suffix(suffix)
        if file.exists():
            file.replace(file.with_name(f"rejected-{turn.client:03d}-{turn.attempt}{suffix}"))


def _with_bytes(run: RunFolder, base: BaseUpdate, start: Adapter, turn: Turn, entry: Entry) -> Entry:
    """The entry with what was sent in vain: the broadcast, and an update of the size asked for by whoever sent one."""
    sent = start if entry.status in ("late", "surplus", "rejected") else None
    return replace(entry, bytes=crossing(run, turn, due(run, turn, base, start), start, sent))


def virtual_seconds(config: RunConfig, roll: Roll) -> float:
    """How long the round waited for its clients, in virtual seconds, all attempts together.

    Until the last update that it took, where it had enough; otherwise until the deadline if somebody was missing, or
    until the last one arrived.
    """
    return sum(
        _waited(config, [entry for entry in roll.entries if entry.attempt == attempt])
        for attempt in range(roll.attempts)
    )


def _waited(config: RunConfig, entries: Sequence[Entry]) -> float:
    statuses = {entry.status for entry in entries}
    deadline = config.channel.deadline_s
    if "surplus" not in statuses and deadline is not None and statuses & {"crashed", "late"}:
        return deadline
    return max((entry.delay_s for entry in entries if entry.status in ("completed", "rejected")), default=0.0)
