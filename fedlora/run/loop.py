"""A federated run as a plain loop, without Prefect or MLflow: the same rounds, in the same run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from fedlora.config import RunConfig
from fedlora.data import picture
from fedlora.errors import ClientFailed, WorkerError
from fedlora.metrics import RoundRecord
from fedlora.run import export, jobs, participation, preflight, recovery, rounds
from fedlora.run.participation import Ask
from fedlora.run.rounds import Timings
from fedlora.run.runfolder import RunFolder
from fedlora.training.workers import Pool, open_pool, slot_devices

Say = Callable[[str], None]


def train(
    config: RunConfig,
    path: str | Path,
    report: Callable[[RoundRecord], None] | None = None,
    say: Say = lambda line: None,
) -> list[RoundRecord]:
    """Run (or continue) a federated run in the folder `path`; returns the record of every round.

    Args:
        config: the run.
        path: its folder; one that was interrupted is continued where it stopped.
        report: called with each round's record as it is finished.
        say: called with a line when something is worth one: damage that was found, how data was read, clients that
            did not complete.

    Raises:
        FedloraError: whatever the user can mend, in one line; before there is a folder where it can be known then.
    """
    preflight.before_run(config, Path(path))
    run = RunFolder.create(Path(path), config)
    # The pool is closed before the threads: one that waits for a worker that hangs would be waited for.
    slots = len(slot_devices(config.runner))
    with run.held(), ThreadPoolExecutor(slots) as threads, open_pool(config.runner) as pool:
        for line in recovery.mend(run):
            say(line)
        pool.run(jobs.prepare_data, run.path)
        for line in jobs.told_of_data(run):
            say(line)
        if head := pool.run(jobs.initialise, run.path).get("head"):
            say(head)
        for number in rounds.unfinished(run):
            resumed = rounds.begun(run, number)
            begun = trained = time.perf_counter()
            if number:
                _ask_clients(run, pool, threads, number, say)
                trained = time.perf_counter()
                rounds.aggregate(run, number)
            record = _close_round(run, pool, threads, number, begun, Timings(trained - begun, resumed=resumed))
            recovery.prune(run, number)
            if report:
                report(record)
            picture.draw_once(run.path)  # not before the first score, for which somebody waits
        picture.draw_once(run.path)
        export.final(run)
    return rounds.records(run)


def _ask_clients(run: RunFolder, pool: Pool, threads: ThreadPoolExecutor, number: int, say: Say) -> None:
    """Let clients train until enough of their updates are there."""
    while ask := participation.next_ask(run, number):
        outcomes = threads.map(lambda client, ask=ask: _why_failed(run, pool, ask, client), ask.clients)
        failed = {client: why for client, why in zip(ask.clients, outcomes, strict=True) if why}
        roll = participation.receive(run, ask, failed)
        if line := roll.told(ask):
            say(line)


def _why_failed(run: RunFolder, pool: Pool, ask: Ask, client: int) -> str | None:
    """Train a client, more than once where its worker dies; why it could not, if it could not."""
    for left in reversed(range(run.config.runner.retries + 1)):
        try:
            pool.run_within(run.config.runner.timeout_s, jobs.fine_tune, run.path, ask.round, client, ask.attempt)
        except ClientFailed as error:
            return str(error)
        except WorkerError as error:
            if not left:
                return str(error)
        else:
            break
    return None


def _close_round(
    run: RunFolder, pool: Pool, threads: ThreadPoolExecutor, number: int, begun: float, spent: Timings
) -> RoundRecord:
    evaluating = time.perf_counter()
    parts = rounds.evaluation_parts(run, number)
    scores = list(threads.map(lambda part: pool.run(jobs.evaluate, run.path, number, part), parts))
    now = time.perf_counter()
    timings = replace(spent, evaluate=now - evaluating, round=now - begun)
    return rounds.finish(run, number, parts, scores, timings)
