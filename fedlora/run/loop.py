"""A federated run as a plain loop, without Prefect or MLflow: the same rounds, in the same run folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from fedlora.config import RunConfig
from fedlora.data import picture
from fedlora.errors import ClientFailed, WorkerError, worth_retrying
from fedlora.metrics import RoundRecord
from fedlora.objective import Scores
from fedlora.run import export, jobs, preflight, recovery, rounds
from fedlora.run.participation import Ask, Roll
from fedlora.run.play import Observer, Trained, play
from fedlora.run.records import Part
from fedlora.run.runfolder import RunFolder
from fedlora.run.server import Server
from fedlora.training.workers import Pool, open_pool, slot_devices

T = TypeVar("T")

_RETRIES = 2
"""How often a step of a round is tried again after a passing fault."""


def train(
    config: RunConfig,
    path: str | Path,
    report: Callable[[RoundRecord], None] = lambda record: None,
    say: Callable[[str], None] = lambda line: None,
) -> list[RoundRecord]:
    """Run (or continue) a federated run in the folder `path`; returns the record of every round.

    Args:
        config: the run.
        path: its folder; one that was interrupted is continued where it stopped.
        report: called with each round's record as it is finished.
        say: called with a line when something is worth one: damage that was found, how data was read, clients that
            did not complete, a model that runs code of its own.

    Raises:
        FedloraError: whatever the user can mend, in one line; before there is a folder where it can be known then.
    """
    preflight.before_run(config, Path(path))
    run = RunFolder.create(Path(path), config)
    # The pool is closed before the threads: one that waits for a worker that hangs would be waited for.
    slots = len(slot_devices(config.runner))
    with run.held(), ThreadPoolExecutor(slots) as threads, open_pool(config.runner) as pool:
        server = Server(run)
        play(server, LocalHands(server, pool, threads), _Told(run, report, say))
    return rounds.records(run)


class _Told(Observer):
    """Passes on what the caller wants to hear, and keeps the folder: pictures when nobody waits, no more than asked."""

    def __init__(self, run: RunFolder, report: Callable[[RoundRecord], None], say: Callable[[str], None]) -> None:
        self._run, self._report, self._say = run, report, say

    def say(self, line: str) -> None:
        self._say(line)

    def clients(self, number: int, done: int, of: int) -> None:
        if not done:
            picture.draw_once(self._run.path)

    def round(self, record: RoundRecord) -> None:
        recovery.prune(self._run, record.round)
        self._report(record)

    def trained(self) -> None:
        picture.draw_once(self._run.path)


class LocalHands:
    """The work is done by the slots of a pool, and by this process."""

    def __init__(self, server: Server, pool: Pool, threads: ThreadPoolExecutor) -> None:
        self._server, self._pool, self._threads = server, pool, threads
        self._run, self._runner = server.run, server.run.config.runner

    def prepare(self) -> None:
        self._pool.run(jobs.prepare_data, self._run.path)

    def initialise(self) -> str | None:
        head: str | None = self._pool.run(jobs.initialise, self._run.path)
        return head

    def fine_tune(self, ask: Ask, trained: Trained) -> Mapping[int, str]:
        waiting = {self._threads.submit(self._why_failed, ask, client): client for client in ask.clients}
        trained(0)
        failed = {}
        for done, future in enumerate(as_completed(waiting), start=1):
            if why := future.result():
                failed[waiting[future]] = why
            trained(done)
        return failed

    def _why_failed(self, ask: Ask, client: int) -> str | None:
        """Train a client, more than once where its worker dies; why it could not, if it could not."""
        arguments = (self._run.path, ask.round, client, ask.attempt)
        try:
            again(
                self._runner.retries,
                lambda: self._pool.run_within(self._runner.timeout_s, jobs.fine_tune, *arguments),
            )
        except (ClientFailed, WorkerError) as error:
            return str(error)
        return None

    def receive(self, ask: Ask, failed: Mapping[int, str]) -> Roll:
        return again(_RETRIES, lambda: self._server.receive(ask, failed))

    def aggregate(self, number: int) -> None:
        again(_RETRIES, lambda: self._server.aggregate(number))

    def evaluate(self, number: int, parts: Sequence[Part]) -> Sequence[Scores]:
        def score(part: Part) -> Scores:
            return again(_RETRIES, lambda: self._pool.run(jobs.evaluate, self._run.path, number, part))

        return list(self._threads.map(score, parts))

    def publish(self) -> None:
        export.final(self._run)


def again(retries: int, call: Callable[[], T]) -> T:
    """What a call returns; after a fault that may pass (`worth_retrying`) it is tried again, later each time."""
    for attempt in range(retries):
        try:
            return call()
        except Exception as error:
            if not worth_retrying(error):
                raise
            time.sleep(attempt)
    return call()
