"""What crosses the wire for one client in one round, in bytes.

A plan says what brings a client that took part in the round before up to date. One that was away lacks more: every part
that travelled meanwhile, and what was added to the base. Everything counts from the state before round one, which
follows from the run's seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fedlora.adapter.base_update import BaseUpdate
from fedlora.adapter.weights import Adapter, Part, wire_size
from fedlora.files.atomic import Stamp, stamp
from fedlora.metrics import Bytes
from fedlora.run.runfolder import RunFolder
from fedlora.seeds import Turn
from fedlora.strategies.base import NOTHING, Strategy

_ROUNDS = 64
"""Whose records are remembered."""


@dataclass(frozen=True)
class Due:
    """What a client must receive to hold the broadcast and its base: it follows from when it was last asked."""

    parts: frozenset[Part]
    """Of the broadcast."""
    base: int
    """Bytes of base update."""


def due(run: RunFolder, turn: Turn, base: BaseUpdate, start: Adapter) -> Due:
    """What a client must receive.

    Args:
        run: the rounds before.
        turn: who is asked.
        base: all that was added to the base before the round.
        start: the broadcast.
    """
    return Due(parts_down(run, turn, start), missed_base(run, turn, base.wire_bytes()))


def crossing(run: RunFolder, turn: Turn, needed: Due, start: Adapter, upload: Adapter | None) -> Bytes:
    """What crosses the wire for a client.

    Args:
        run: which.
        turn: who is asked.
        needed: what it must receive.
        start: the broadcast.
        upload: what it sends, if anything.
    """
    down = wire_size(start, needed.parts)
    up = wire_size(upload, run.strategy.plan(turn.round).up) if upload is not None else (0, 0)
    return Bytes(up_adapter=up[0], up_head=up[1], down_adapter=down[0], down_head=down[1], down_base=needed.base)


def parts_down(run: RunFolder, turn: Turn, start: Adapter) -> frozenset[Part]:
    """The parts of `start` that a client is sent: those of the round's plan, and of the plans of all rounds since it
    was last asked; of all rounds so far where its rank has risen since, because it never held the new indices.
    """
    strategy = run.strategy
    now = strategy.plan(turn.round).down
    if _travelled(strategy, 1, turn.round) <= now:
        return now
    since, rank = _last_asked(run, turn)
    return now | _travelled(strategy, 1 if start.rank > rank else since + 1, turn.round)


def _travelled(strategy: Strategy, first: int, last: int) -> frozenset[Part]:
    """The parts that travel down in any of these rounds."""
    return NOTHING.union(*(strategy.plan(number).down for number in range(first, last + 1)))


def missed_base(run: RunFolder, turn: Turn, total: int) -> int:
    """Bytes of base update that a client downloads.

    All that was added since it was last asked, or the whole update (`total`) where that is smaller.
    """
    if not total:
        return 0
    since, _ = _last_asked(run, turn)
    return min(sum(before.base_bytes for before in _closed(run, turn, max(since, 1))), total)


def _last_asked(run: RunFolder, turn: Turn) -> tuple[int, float]:
    """The last round in which a client was asked and so was sent what it lacked (this one, where it is asked again; 0
    where there is none), and its rank then (infinite where it had the highest)."""
    roll = run.read_json(run.roll_name(turn.round)) or {"entries": []}
    if any(entry["client"] == turn.client for entry in roll["entries"]):
        return turn.round, math.inf
    for before in _closed(run, turn, 1):
        if turn.client in before.asked:
            return before.round, before.lower_ranks.get(turn.client, math.inf)
    return 0, math.inf


@dataclass(frozen=True)
class _Closed:
    """What the record of a round says of who was sent what."""

    round: int
    asked: frozenset[int]
    lower_ranks: Mapping[int, int]
    """Of those who were asked and had not the highest."""
    base_bytes: int


def _closed(run: RunFolder, turn: Turn, first: int) -> Iterator[_Closed]:
    """The rounds before this one, the latest first, down to `first`."""
    for number in range(turn.round - 1, first - 1, -1):
        name = run.record_name(number)
        yield _of(run.path / name, stamp(run.path / name), number)


@lru_cache(_ROUNDS)
def _of(file: Path, _: Stamp | None, number: int) -> _Closed:
    """What a record says, read once for the many clients of a round."""
    record = RunFolder(file.parents[2]).need_json(str(file.relative_to(file.parents[2])))
    ranks = {int(client): rank for client, rank in record.get("ranks", {}).items()}
    return _Closed(number, frozenset(record["asked"]), ranks, int(record["base_bytes"]))
