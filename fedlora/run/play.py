"""A federated run, told once. Who plays it brings the hands that do the work and the observers who hear of it: threads
and worker processes here (`fedlora.run.loop`), tasks of Prefect in `flows.federated`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from fedlora.metrics import RoundRecord
from fedlora.model import provenance
from fedlora.objective import Scores
from fedlora.run import before, jobs, participation, recovery, rounds, together
from fedlora.run.participation import Ask, Roll
from fedlora.run.records import Part
from fedlora.run.runfolder import RunFolder
from fedlora.run.server import Server, Timings

Trained = Callable[[int], None]
"""Is told how many clients of an attempt have come to an end."""


class Hands(Protocol):
    """Who does the work of a run. Each piece may be done again without harm: what is done is found in the folder."""

    def prepare(self) -> None:
        """Read, tokenise and partition the data (`jobs.prepare_data`)."""

    def initialise(self) -> str | None:
        """Make the state before training (`jobs.initialise`); what is to be said of the model, if anything."""

    def fine_tune(self, ask: Ask, trained: Trained) -> Mapping[int, str]:
        """Let clients train (`jobs.fine_tune`) and wait for them; why those that could not, could not.

        `trained(0)` is called once they are at work.
        """

    def receive(self, ask: Ask, failed: Mapping[int, str]) -> Roll:
        """Take in what they have sent (`Server.receive`)."""

    def aggregate(self, number: int) -> None:
        """Combine what was accepted (`Server.aggregate`)."""

    def evaluate(self, number: int, parts: Sequence[Part]) -> Sequence[Scores]:
        """Score the model after a round (`jobs.evaluate`), each part by whoever is free."""

    def publish(self) -> None:
        """Write the final adapter, tables and figures (`fedlora.run.export`), and deliver them."""


class Observer:
    """Who hears of a run under way; does nothing. A display, a tracker or a page is a subclass."""

    def say(self, line: str) -> None:
        """Something worth a line happened."""

    def clients(self, number: int, done: int, of: int) -> None:
        """So many of the clients that a round has asked have come to an end; 0 once they are at work: a good time for
        what should keep nobody waiting."""

    def round(self, record: RoundRecord) -> None:
        """A round is complete; round 0 is the evaluation before training."""

    def trained(self) -> None:
        """All rounds are complete; the adapter, tables and figures are about to be written."""

    def failed(self, error: BaseException) -> None:
        """The run ends before it is complete."""


class Observers(Observer):
    """Several, told one after the other."""

    def __init__(self, *observers: Observer) -> None:
        self._all = observers

    def say(self, line: str) -> None:
        for each in self._all:
            each.say(line)

    def clients(self, number: int, done: int, of: int) -> None:
        for each in self._all:
            each.clients(number, done, of)

    def round(self, record: RoundRecord) -> None:
        for each in self._all:
            each.round(record)

    def trained(self) -> None:
        for each in self._all:
            each.trained()

    def failed(self, error: BaseException) -> None:
        for each in self._all:
            each.failed(error)


def play(server: Server, hands: Hands, observer: Observer) -> None:
    """Play a run, or what is left of it. To be called with its folder held.

    Raises:
        FedloraError: whatever the user can mend, in one line.
    """
    run = server.run
    try:
        if notice := provenance.remote_code_notice(run.config.model):
            observer.say(notice)
        for line in run.objective.notices(run.config):
            observer.say(line)
        for line in recovery.mend(run):
            observer.say(line)
        hands.prepare()
        for line in jobs.told_of_data(run):
            observer.say(line)
        if head := hands.initialise():
            observer.say(head)
        if line := together.told(run):
            observer.say(line)
        for number in rounds.unfinished(run):
            observer.round(play_round(server, number, hands, observer))
        observer.trained()
        hands.publish()
    except BaseException as error:
        observer.failed(error)
        raise


def play_round(server: Server, number: int, hands: Hands, observer: Observer) -> RoundRecord:
    """One round: the clients train, the server combines, the result is scored, the round is closed. Round 0 only
    scores.

    Raises:
        RunAborted: too few clients completed, or something of the round is missing.
    """
    run = server.run
    watch = _Stopwatch(rounds.begun(run, number))
    if number:
        _collect(run, number, hands, observer, watch)
        hands.aggregate(number)
        watch.next()
    parts = rounds.evaluation_parts(run, number)
    scores = _scores(server, number, parts, hands, observer)
    watch.lap("evaluate")
    return server.close(number, parts, scores, watch.timings())


def _scores(server: Server, number: int, parts: Sequence[Part], hands: Hands, observer: Observer) -> Sequence[Scores]:
    """What the parts come to; before training perhaps as another run knows it, which began alike."""
    if number:
        return hands.evaluate(number, parts)
    if found := before.known(server, parts):
        observer.say("the scores before training are those of an earlier run that began alike")
        return found
    scores = hands.evaluate(number, parts)
    before.keep(server, parts, scores)
    return scores


def _collect(run: RunFolder, number: int, hands: Hands, observer: Observer, watch: _Stopwatch) -> None:
    """Let clients train until enough of their updates are accepted."""
    while ask := participation.next_ask(run, number):
        watch.next()
        failed = hands.fine_tune(ask, partial(observer.clients, number, of=len(ask.clients)))
        watch.lap("train")
        if line := hands.receive(ask, failed).told(ask):
            observer.say(line)


class _Stopwatch:
    """Wall time of the phases of a round."""

    def __init__(self, resumed: bool) -> None:
        self._resumed = resumed
        self._begun = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """A phase is over; its seconds are added to those that it had before."""
        begun = self._last
        self.next()
        self._laps[name] = self._laps.get(name, 0.0) + self._last - begun

    def next(self) -> None:
        """The next phase begins."""
        self._last = time.perf_counter()

    def timings(self) -> Timings:
        return Timings(**self._laps, round=time.perf_counter() - self._begun, resumed=self._resumed)
