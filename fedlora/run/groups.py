"""Pieces of work are dealt to the slots in groups of some seconds: what handing over costs (a task run of Prefect's) is
paid once for each. A piece, not its group, is what is done, found in the folder, tried again and counted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

from fedlora.errors import ClientFailed, FedloraError, WorkerError, worth_retrying
from fedlora.objective import Scores
from fedlora.run import jobs, together
from fedlora.run.participation import Ask
from fedlora.run.records import Part
from fedlora.run.runfolder import RunFolder
from fedlora.run.traffic import Due
from fedlora.training.workers import Slot

P = TypeVar("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

RETRIES = 2
"""How often a step of a round is tried again after a passing fault; a client as often as `runner.retries` says."""
_AHEAD = 2
"""Groups for each slot that are handed over before one has ended, so that no slot waits for its next."""
_LEAST = 0.1
"""Of a group's seconds: what the last groups of a round are not cut below."""


_SENT = "sent"
"""The kind of clients whose uploads are there, of a round that is gone on with: they are looked at, not trained."""
_LOOK_S = 0.005


@dataclass(frozen=True)
class Worked(Generic[T_co]):
    """What came of each piece of a group, and the seconds of a piece; None where nothing was left to do."""

    results: Sequence[T_co]
    each_s: float | None


class Future(Protocol[T_co]):
    """As `concurrent.futures` and Prefect have them."""

    def result(self) -> T_co: ...

    def add_done_callback(self, fn: Callable[[Any], None], /) -> None: ...


Say = Callable[[str], None]


def _silent(line: str) -> None:
    """Nobody listens."""


Submit = Callable[[Sequence[P], Callable[[], None]], Future[Worked[T]]]
"""Hands over a group; the other function is to be called as each of its pieces comes to an end."""


class Dealer:
    """Cuts groups by what pieces of a kind have taken so far; the first of a kind, of which nothing is known, go alone.

    Groups become smaller towards the end, so that slots end at about the same time (guided self-scheduling,
    Polychronopoulos & Kuck 1987).

    Args:
        seconds: of work in a group; 0 for groups of one.
        slots: how many groups are worked on side by side; a function where that may change.
    """

    def __init__(self, seconds: float, slots: int | Callable[[], int]) -> None:
        self._seconds = seconds
        self._slots: Callable[[], int] = slots if callable(slots) else lambda: slots
        self._each: dict[str, float] = {_SENT: _LOOK_S}

    def deal(
        self,
        pieces: Sequence[P],
        kind: Callable[[P], str],
        submit: Submit[P, T],
        ended: Callable[[int], None] = lambda done: None,
        least: int = 1,
    ) -> list[T]:
        """Have all pieces done; what came of each, in their order.

        Args:
            pieces: a group has neighbours of one kind.
            kind: of a piece.
            submit: hands over a group.
            ended: is told how many pieces have come to an end; 0 once the first are handed over.
            least: pieces that stay together, from the first on: a group has a multiple of them, but for the last.
        """
        found: dict[int, Sequence[T]] = {}
        heard: SimpleQueue[tuple[int, Future[Worked[T]]] | None] = SimpleQueue()
        next_piece = under_way = done = 0
        told = False
        while next_piece < len(pieces) or under_way:
            while next_piece < len(pieces) and under_way < _AHEAD * self._slots():
                group = self._cut(pieces, next_piece, kind, least)
                future = submit(group, lambda: heard.put(None))
                future.add_done_callback(_passed_on(heard, next_piece))
                next_piece, under_way = next_piece + len(group), under_way + 1
            if not told:
                told = True
                ended(0)
            news = heard.get()
            if news is None:
                done = min(done + 1, len(pieces))
                ended(done)
                continue
            first, future = news
            worked, under_way = future.result(), under_way - 1
            found[first] = worked.results
            if worked.each_s is not None:
                self._each[kind(pieces[first])] = worked.each_s
        return [result for first in sorted(found) for result in found[first]]

    def train(
        self,
        run: RunFolder,
        ask: Ask,
        submit: Callable[[Ask, Callable[[], None]], Future[Worked[str | None]]],
        trained: Callable[[int], None],
    ) -> dict[int, str]:
        """Have the clients of an attempt trained (`train`), some of them in a group; why each that could not, could
        not."""

        def some(clients: Sequence[int], ended: Callable[[], None]) -> Future[Worked[str | None]]:
            return submit(replace(ask, clients=tuple(clients)), ended)

        size = together.size(run)
        sent: set[int] = set()
        for cohort in together.cohorts(ask.clients, size):
            if all((run.path / f"{run.client_stem(ask.round, client)}.json").exists() for client in cohort):
                sent.update(cohort)
        why = self.deal(ask.clients, lambda client: _SENT if client in sent else "clients", some, trained, size)
        return {client: each for client, each in zip(ask.clients, why, strict=True) if each}

    def _cut(self, pieces: Sequence[P], first: int, kind: Callable[[P], str], least: int) -> Sequence[P]:
        of = kind(pieces[first])
        last = min(len(pieces), first + least * math.ceil(self.size(of, len(pieces) - first) / least))
        other = next((place for place in range(first, last) if kind(pieces[place]) != of), last)
        return pieces[first:other]

    def size(self, kind: str, left: int) -> int:
        """How many of the pieces of a kind that are left are the next group."""
        each = self._each.get(kind)
        if not self._seconds or each is None:
            return 1
        most = self._seconds / max(each, 1e-6)
        even = math.ceil(left / (_AHEAD * self._slots()))
        return max(1, min(left, int(most), max(even, int(_LEAST * most))))


def _passed_on(heard: SimpleQueue[Any], first: int) -> Callable[[Any], None]:
    return lambda future: heard.put((first, future))


def train(
    slot: Slot,
    run: RunFolder,
    ask: Ask,
    ended: Callable[[], None],
    say: Say = _silent,
    needed: Mapping[int, Due] = MappingProxyType({}),
) -> Worked[str | None]:
    """Let clients train in a slot, one after the other or as many together as is settled (`together`); why each that
    could not, could not. What each must receive is `needed`, where the rounds before are not in the folder.

    A client is tried again after a passing fault, `runner.retries` times, which is said; after that the others go on
    without it. Those whose worker dies while they are trained together are trained one by one.

    Raises:
        FedloraError: what concerns not one client alone.
    """
    size = together.size(run)
    if size == 1:
        return _worked(ask.clients, lambda client: _one(slot, run, ask, client, say, needed), ended)
    results: list[str | None] = []
    count, begun = 0, time.perf_counter()
    for some in together.cohorts(ask.clients, size):
        found, worked = _cohort(slot, run, replace(ask, clients=some), say, needed)
        results += found
        count += worked
        for _ in some:
            ended()
    return Worked(results, (time.perf_counter() - begun) / count if count else None)


def _one(
    slot: Slot, run: RunFolder, ask: Ask, client: int, say: Say, needed: Mapping[int, Due]
) -> tuple[str | None, bool]:
    """Why a client could not train, and whether there was work."""
    runner, worked = run.config.runner, False

    def once() -> None:
        nonlocal worked
        turn = (ask.round, client, ask.attempt)
        worked |= slot.run_within(runner.timeout_s, jobs.fine_tune, run.path, *turn, needed.get(client))

    try:
        again(runner.retries, once, say)
    except (ClientFailed, WorkerError) as error:
        return str(error), True
    return None, worked


def _cohort(slot: Slot, run: RunFolder, ask: Ask, say: Say, needed: Mapping[int, Due]) -> tuple[list[str | None], int]:
    """Why each client of a cohort could not train, and of how many there was work."""
    runner = run.config.runner
    seconds = None if runner.timeout_s is None else runner.timeout_s * len(ask.clients)

    def once() -> jobs.Together:
        turns = (ask.round, ask.clients, ask.attempt)
        return slot.run_within(seconds, jobs.fine_tune_together, run.path, *turns, dict(needed))

    try:
        came = again(runner.retries, once, say)
    except WorkerError as error:
        say(f"{error}; one by one")
        each = [_one(slot, run, ask, client, say, needed) for client in ask.clients]
        return [why for why, _ in each], sum(worked for _, worked in each)
    for line in came.said:
        say(line)
    return [came.failed.get(client) for client in ask.clients], came.worked


def evaluate(
    slot: Slot, run: RunFolder, number: int, parts: Sequence[Part], ended: Callable[[], None], say: Say = _silent
) -> Worked[Scores]:
    """Score parts after a round one after the other in a slot."""

    def one(part: Part) -> tuple[Scores, bool]:
        return again(RETRIES, lambda: slot.run(jobs.evaluate, run.path, number, part), say), True

    return _worked(parts, one, ended)


def _worked(pieces: Sequence[P], one: Callable[[P], tuple[T, bool]], ended: Callable[[], None]) -> Worked[T]:
    """What `one` makes of each piece, and says whether there was work."""
    results, count, begun = [], 0, time.perf_counter()
    for piece in pieces:
        result, worked = one(piece)
        results.append(result)
        count += worked
        ended()
    return Worked(results, (time.perf_counter() - begun) / count if count else None)


def again(retries: int, call: Callable[[], T], say: Say = _silent) -> T:
    """What a call returns; after a fault that may pass (`worth_retrying`) it is tried again, later each time."""
    for attempt in range(retries):
        try:
            return call()
        except Exception as error:
            if not worth_retrying(error):
                raise
            kind = "" if isinstance(error, FedloraError) else f"{type(error).__name__}: "
            say(f"{kind}{error}; trying again ({attempt + 1} of {retries})")
            time.sleep(attempt)
    return call()
