"""A federated run as a plain loop, without Prefect or MLflow: the same rounds, in the same run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fedlora.config import RunConfig
from fedlora.data import picture
from fedlora.errors import ConfigError
from fedlora.metrics import RoundRecord
from fedlora.objective import Scores
from fedlora.run import export, groups, jobs, preflight, recovery, rounds
from fedlora.run.groups import RETRIES, Dealer, Future, Worked, again
from fedlora.run.participation import Ask, Roll
from fedlora.run.play import Observer, Trained, play
from fedlora.run.records import Part
from fedlora.run.runfolder import RunFolder
from fedlora.run.server import Server
from fedlora.training import forerunner
from fedlora.training.workers import Pool, Slot, open_pool, slot_devices

T = TypeVar("T")


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
            did not complete, a model that runs code of its own, what is tried again. Also from the threads that wait
            for workers.

    Raises:
        FedloraError: whatever the user can mend, in one line; before there is a folder where it can be known then.
    """
    if config.runner.clustered:
        raise ConfigError(
            f"runner.kind={config.runner.kind} needs Prefect, which this loop does without; use `fedlora run`, or set "
            "runner.kind=processes"
        )
    if config.runner.kind == "processes" and config.runner.device in ("auto", "cpu"):
        forerunner.begin()
    preflight.before_run(config, Path(path))
    run = RunFolder.create(Path(path), config)
    # The pool is closed before the threads: one that waits for a worker that hangs would be waited for.
    slots = len(slot_devices(config.runner))
    with run.held(), ThreadPoolExecutor(slots) as threads, open_pool(config.runner) as pool:
        server = Server(run)
        play(server, LocalHands(server, pool, threads, say), _Told(run, report, say))
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

    def __init__(self, server: Server, pool: Pool, threads: ThreadPoolExecutor, say: Callable[[str], None]) -> None:
        self._server, self._pool, self._threads, self._say = server, pool, threads, say
        self._run, self._dealer = server.run, Dealer(server.run.config.runner.group_s, len(pool.slots))

    def prepare(self) -> None:
        self._pool.run(jobs.prepare_data, self._run.path)

    def initialise(self) -> str | None:
        head: str | None = self._pool.run(jobs.initialise, self._run.path)
        return head

    def fine_tune(self, ask: Ask, trained: Trained) -> Mapping[int, str]:
        def submit(some: Ask, ended: Callable[[], None]) -> Future[Worked[str | None]]:
            return self._threads.submit(
                self._in_slot, lambda slot: groups.train(slot, self._run, some, ended, self._say)
            )

        return self._dealer.train(self._run, ask, submit, trained)

    def receive(self, ask: Ask, failed: Mapping[int, str]) -> Roll:
        return again(RETRIES, lambda: self._server.receive(ask, failed))

    def aggregate(self, number: int) -> None:
        again(RETRIES, lambda: self._server.aggregate(number))

    def evaluate(self, number: int, parts: Sequence[Part]) -> Sequence[Scores]:
        def submit(some: Sequence[Part], ended: Callable[[], None]) -> Future[Worked[Scores]]:
            return self._threads.submit(
                self._in_slot, lambda slot: groups.evaluate(slot, self._run, number, some, ended, self._say)
            )

        return self._dealer.deal(parts, lambda part: part.split, submit)

    def _in_slot(self, work: Callable[[Slot], T]) -> T:
        with self._pool.slot() as slot:
            return work(slot)

    def publish(self) -> None:
        export.final(self._run)
