"""The steps of a federated run as Prefect tasks.

Each takes a `Run` (its folder and strategy) and small numbers, works in the run folder, and returns small numbers. What
is done is found in the folder and not done again, so results need no store of Prefect's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from fedlora.config import RunConfig
from fedlora.data import picture
from fedlora.errors import ClientFailed, FedloraError, WorkerError
from fedlora.run import export, jobs, participation, recovery, rounds
from fedlora.run.participation import Ask, Roll
from fedlora.run.runfolder import RunFolder
from fedlora.training import workers
from fedlora.training.evaluation import Scores
from mlflow_tracking import tracker
from mlflow_tracking.tracker import Tracked
from tasks.devices import held


@dataclass(frozen=True)
class Run:
    """What a task needs to find a run."""

    folder: Path
    strategy: str

    @cached_property
    def state(self) -> RunFolder:
        return RunFolder(self.folder)

    @property
    def config(self) -> RunConfig:
        return self.state.config


def _worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """A dead worker or a passing fault of the system is tried again; what the user must mend is not."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, WorkerError) or not isinstance(error, FedloraError)


def _step(name: str) -> Callable[[Callable[..., Any]], Any]:
    return task(name=name, task_run_name=f"{{run.strategy}} {name}", cache_policy=NO_CACHE, persist_result=False)


def _round_step(name: str, detail: str = "") -> Callable[[Callable[..., Any]], Any]:
    return task(
        name=name,
        task_run_name=f"{{run.strategy}} round {{number}} {name}{detail}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=2,
        retry_delay_seconds=exponential_backoff(backoff_factor=1),
        retry_jitter_factor=0.5,
        retry_condition_fn=_worth_retrying,
    )


@_step("partition")
def partition(run: Run) -> dict[str, Any]:
    """Read, tokenise and partition the data; the partition's summary."""
    return _in_pool(run, jobs.prepare_data)


@_step("initialise")
def initialise(run: Run) -> dict[str, Any]:
    """Attach a fresh adapter to the base model: the state before training; its size."""
    return _in_pool(run, jobs.initialise)


@_round_step("fine-tune", " client {client}")
def fine_tune(run: Run, number: int, client: int, attempt: int) -> dict[str, Any]:
    """Train one client in the next free slot; its mean loss, local accuracy and seconds, or why it could not."""
    runner = run.config.runner
    try:
        with workers.current_pool(runner).slot() as slot, held(runner, slot.device):
            record = slot.run_within(runner.timeout_s, jobs.fine_tune, run.folder, number, client, attempt)
    except ClientFailed as error:
        return {"client": client, "failed": str(error)}
    if record is None:
        return {"client": client, "sent": False}
    local = Scores.from_json(record["local"]) if record["local"] else None
    return {
        "client": client,
        "loss": record["losses"][-1],
        "accuracy": local.accuracy if local and local.examples else None,
        "seconds": record["seconds"],
    }


@_round_step("receive")
def receive(run: Run, number: int, ask: Ask, failed: dict[int, str]) -> Roll:
    """Inspect what the clients have sent, and write down what became of each."""
    return participation.receive(run.state, ask, failed)


@_round_step("aggregate")
def aggregate(run: Run, number: int) -> float:
    """Combine the updates, save the new state, measure its divergence; the seconds that aggregation took."""
    return float(rounds.aggregate(run.state, number)["seconds"])


@_round_step("evaluate", " part {index}")
def evaluate(run: Run, number: int, index: int, part: dict[str, Any]) -> dict[str, Any]:
    """Score the broadcast model on one part of the test set."""
    return _in_pool(run, jobs.evaluate, number, part)


@_step("open-tracking")
def open_tracking(run: Run, name: str, parent: str | None, tags: dict[str, str]) -> Tracked:
    """Open (or continue) the MLflow run."""
    return tracker.start(run.state, name, parent, tags)


@_step("describe")
def describe(run: Run, tracked: Tracked) -> tuple[Tracked, str]:
    """Draw the partition; log configuration, data set and partition. How far that got, and why it got no further."""
    picture.draw_once(run.folder)
    return tracker.offer(run.state, tracked)


@_round_step("track")
def track(run: Run, number: int, tracked: Tracked) -> tuple[Tracked, str]:
    """Log a round that is complete, with every earlier one that MLflow has not got yet; why it waits, if it does."""
    tracked, waits = tracker.offer(run.state, tracked)
    recovery.prune(run.state, tracked.logged)  # what MLflow has not got may be needed for it
    return tracked, waits


@_step("publish")
def publish(run: Run, tracked: Tracked, note: str) -> None:
    """Write the final adapter, tables and figures, log them, and close the MLflow run."""
    export.final(run.state)
    tracker.finish(run.state, tracked, note)


def _in_pool(run: Run, job: Any, *args: Any) -> dict[str, Any]:
    result: dict[str, Any] = workers.current_pool(run.config.runner).run(job, run.folder, *args)
    return result
