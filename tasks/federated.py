"""The steps of a federated run as Prefect tasks.

Each takes a `Run` and small numbers, works in the run folder, and returns small values. What is done is found in the
folder and not done again, so results need no store of Prefect's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.tasks import exponential_backoff

from fedlora.data import picture
from fedlora.errors import listed, worth_retrying
from fedlora.objective import Scores
from fedlora.run import export, groups, jobs, recovery
from fedlora.run.groups import RETRIES, Dealer, Future, Worked
from fedlora.run.participation import Ask, Roll
from fedlora.run.play import Trained
from fedlora.run.records import Part
from fedlora.run.runfolder import RunFolder
from fedlora.run.server import Server
from fedlora.training import workers
from mlflow_tracking import tracker
from mlflow_tracking.tracker import Tracked
from tasks.devices import held


@dataclass(frozen=True)
class Run:
    """What a task needs of a run: the server's side of it."""

    server: Server

    @property
    def folder(self) -> RunFolder:
        return self.server.run


def _worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    return worth_retrying(state.result(raise_on_failure=False))


def _step(name: str) -> Callable[[Callable[..., Any]], Any]:
    return task(name=name, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)


def _round_step(name: str, of: str = "") -> Callable[[Callable[..., Any]], Any]:
    return task(
        name=name,
        task_run_name=f"round {{number}} {of}{name}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=RETRIES,
        retry_delay_seconds=exponential_backoff(backoff_factor=1),
        retry_jitter_factor=0.5,
        retry_condition_fn=_worth_retrying,
    )


@_step("partition")
def partition(run: Run) -> None:
    """Read, tokenise and partition the data."""
    _in_pool(run, jobs.prepare_data)


@_step("initialise")
def initialise(run: Run) -> str | None:
    """Attach a fresh adapter to the base model: the state before training; what is to be said of the head."""
    head: str | None = _in_pool(run, jobs.initialise)
    return head


@_round_step("fine-tune", "{group} ")
def fine_tune(run: Run, number: int, group: str, ask: Ask, ended: Callable[[], None]) -> Worked[str | None]:
    """Train a group of clients in the next free slot; why each that could not, could not. A client is tried again by
    itself; the group is where the device is not to be had, or not to be given back: what is done is found."""
    runner = run.folder.config.runner
    with workers.current_pool(runner).slot() as slot, held(runner, slot.device):
        return groups.train(slot, run.folder, ask, ended, get_run_logger().warning)


@_round_step("receive")
def receive(run: Run, number: int, ask: Ask, failed: dict[int, str]) -> Roll:
    """Inspect what the clients have sent, and write down what became of each."""
    return run.server.receive(ask, failed)


@_round_step("aggregate")
def aggregate(run: Run, number: int) -> float:
    """Combine the updates, save the new state, measure its divergence; the seconds that aggregation took."""
    return run.server.aggregate(number).seconds


@_round_step("evaluate", "{group} ")
def evaluate(run: Run, number: int, group: str, parts: Sequence[Part], ended: Callable[[], None]) -> Worked[Scores]:
    """Score the broadcast model on some parts of the test set."""
    with workers.current_pool(run.folder.config.runner).slot() as slot:
        return groups.evaluate(slot, run.folder, number, parts, ended, get_run_logger().warning)


@_step("open-tracking")
def open_tracking(run: Run, name: str, begun_ms: int, parent: str | None, tags: dict[str, str]) -> Tracked:
    """Open (or continue) the MLflow run, which began when the flow did."""
    return tracker.start(run.folder, name, parent, tags, begun_ms)


@_step("describe")
def describe(run: Run, tracked: Tracked) -> tuple[Tracked, str]:
    """Draw the partition; log configuration, data set and partition. How far that got, and why it got no further."""
    picture.draw_once(run.folder.path)
    return tracker.offer(run.folder, tracked)


@_round_step("track")
def track(run: Run, number: int, tracked: Tracked) -> tuple[Tracked, str]:
    """Log a round that is complete, with every earlier one that MLflow has not got yet; why it waits, if it does."""
    tracked, waits = tracker.offer(run.folder, tracked)
    recovery.prune(run.folder, tracked.logged)  # what MLflow has not got may be needed for it
    return tracked, waits


@_step("publish")
def publish(run: Run, tracked: Tracked, note: str) -> None:
    """Write the final adapter, tables and figures, log them, and close the MLflow run."""
    export.final(run.folder)
    tracker.finish(run.folder, tracked, note)


def _in_pool(run: Run, job: Any, *args: Any) -> Any:
    return workers.current_pool(run.folder.config.runner).run(job, run.folder.path, *args)


def named(what: str, numbers: Sequence[int]) -> str:
    """`client 3`, `clients 0–4`."""
    return f"{what}{'s' if len(numbers) > 1 else ''} {listed(numbers)}"


class TaskHands:
    """The hands of a flow: each piece of work is a task of Prefect's, on its page, tried again after a passing fault.

    Args:
        run: which run.
        deliver: called to publish what the run has made.
    """

    def __init__(self, run: Run, deliver: Callable[[], None]) -> None:
        self._run, self._deliver = run, deliver
        runner = run.folder.config.runner
        self._dealer = Dealer(runner.group_s, len(workers.current_pool(runner).slots))

    def prepare(self) -> None:
        partition.submit(self._run).result()

    def initialise(self) -> str | None:
        head: str | None = initialise.submit(self._run).result()
        return head

    def fine_tune(self, ask: Ask, trained: Trained) -> Mapping[int, str]:
        def submit(some: Ask, ended: Callable[[], None]) -> Future[Worked[str | None]]:
            name = named("client", some.clients)
            return cast(Future[Worked[str | None]], fine_tune.submit(self._run, some.round, name, some, ended))

        return self._dealer.train(self._run.folder, ask, submit, trained)

    def receive(self, ask: Ask, failed: Mapping[int, str]) -> Roll:
        roll: Roll = receive.submit(self._run, ask.round, ask, dict(failed)).result()
        return roll

    def aggregate(self, number: int) -> None:
        aggregate.submit(self._run, number).result()

    def evaluate(self, number: int, parts: Sequence[Part]) -> Sequence[Scores]:
        places = {part: place for place, part in enumerate(parts)}

        def submit(some: Sequence[Part], ended: Callable[[], None]) -> Future[Worked[Scores]]:
            name = named("part", [places[part] for part in some])
            return cast(Future[Worked[Scores]], evaluate.submit(self._run, number, name, some, ended))

        return self._dealer.deal(parts, lambda part: part.split, submit)

    def publish(self) -> None:
        self._deliver()

    def close(self) -> None:
        """Let go of what is under way."""

    def told(self) -> str:
        """A line of who has done the work, where that is not plain."""
        return ""
