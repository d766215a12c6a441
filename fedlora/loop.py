"""A federated run as a plain loop, without Prefect or MLflow: the same rounds, in the same run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedlora import export, jobs, rounds
from fedlora.config import RunConfig
from fedlora.metrics import RoundRecord
from fedlora.rounds import Timings
from fedlora.runfolder import RunFolder
from fedlora.workers import Pool, open_pool


def train(
    config: RunConfig, path: str | Path, report: Callable[[RoundRecord], None] | None = None
) -> list[RoundRecord]:
    """Run (or continue) a federated run in the folder `path`; returns the record of every round.

    Args:
        config: the run.
        path: its folder; one that was interrupted is continued where it stopped.
        report: called with each round's record as it is finished.

    Raises:
        FedloraError: whatever the user can mend, in one line.
    """
    run = RunFolder.create(Path(path), config)
    with open_pool(config.runner) as pool, ThreadPoolExecutor(len(pool.slots)) as threads:
        pool.run(jobs.prepare_data, run.path)
        pool.run(jobs.initialise, run.path)
        for number in rounds.unfinished(run):
            begun = trained = time.perf_counter()
            clients: list[int] = []
            if number:
                clients = rounds.select(run, number)
                list(threads.map(lambda client, n=number: pool.run(jobs.fine_tune, run.path, n, client), clients))
                trained = time.perf_counter()
                rounds.aggregate(run, number, clients)
            spent = Timings(train=trained - begun, aggregate=time.perf_counter() - trained)
            _close_round(run, pool, threads, number, clients, begun, spent, report)
    export.final(run)
    return rounds.records(run)


def _close_round(
    run: RunFolder,
    pool: Pool,
    threads: ThreadPoolExecutor,
    number: int,
    clients: list[int],
    begun: float,
    spent: Timings,
    report: Callable[[RoundRecord], None] | None,
) -> None:
    evaluating = time.perf_counter()
    parts = rounds.evaluation_parts(run, number)
    scores = list(threads.map(lambda part: pool.run(jobs.evaluate, run.path, number, part), parts))
    now = time.perf_counter()
    timings = Timings(spent.train, spent.aggregate, now - evaluating, now - begun)
    record = rounds.finish(run, number, clients, parts, scores, timings)
    if report:
        report(record)
