"""The hands of a flow whose clients are trained on a cluster, which may have no disk in common with this machine."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import asdict, dataclass, replace
from typing import Any

from prefect import Flow, Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.states import Crashed

from fedlora.errors import RunAborted, WorkerError, counted, first_line
from fedlora.objective import Scores
from fedlora.run import mirror, together
from fedlora.run.depot import Depot
from fedlora.run.groups import Dealer, Future, Worked
from fedlora.run.participation import Ask
from fedlora.run.play import Trained
from fedlora.run.records import Part
from fedlora.run.request import Answer, Request
from fedlora.training import workers
from tasks import engines
from tasks.federated import Run, TaskHands, named

_WORD_S = 60.0
"""Seconds after which a wait for a machine that has room is worth a line."""
_COUNT_S = 1.0
_QUIET = ("prefect.task_runs",)
_MOST_SUPPLIED = 5
"""How often files are put into the store for a request: machines that hold them may go, one after the other."""
_MOST_THREADS = 256
_TRAIN, _EVALUATE = (
    task(name=name, cache_policy=NO_CACHE, persist_result=False)(work)
    for work, name in ((mirror.train, "fine-tune"), (mirror.evaluate, "evaluate"))
)
_STAND_IN: Flow[Any, Any] = Flow(fn=mirror.name, name="federated")
"""What travels with a task in place of its flow, which Prefect sends along: workers need not import the flows."""


@dataclass
class Crossed:
    """What one worker has done and moved."""

    pieces: int = 0
    fetched: int = 0
    """Bytes out of the engine's store."""
    sent: int = 0
    """Bytes of clients' files."""
    memory: int = 0
    """Most resident bytes."""


class FarHands(TaskHands):
    """As `TaskHands`; clients are trained, and parts scored, by tasks on a cluster. This machine writes what they send.

    Args:
        run: which run.
        deliver: called to publish what the run has made.
    """

    def __init__(self, run: Run, deliver: Callable[[], None]) -> None:
        super().__init__(run, deliver)
        runner = run.folder.config.runner
        self._engine, self._runner = engines.current(runner), runner
        self._depot = Depot(run.folder, run.server.state, self._engine.put)
        self._slots, self._counted_at = 1, -math.inf
        self._dealer = Dealer(runner.group_s, self._room)
        self._threads = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="far")
        self._under_way: set[Any] = set()
        self._closing, self._lock = False, threading.Lock()
        self.crossed: dict[str, Crossed] = {}
        """By worker."""

    def _room(self) -> int:
        """How many clients the cluster has room for, as it was a moment ago."""
        if time.monotonic() - self._counted_at > _COUNT_S:
            self._slots, self._counted_at = max(1, self._engine.slots()), time.monotonic()
        return self._slots

    def initialise(self) -> str | None:
        head = super().initialise()
        workers.current_pool(self._runner).rest()  # a base model is not kept here: it is needed on the cluster
        return head

    def fine_tune(self, ask: Ask, trained: Trained) -> Mapping[int, str]:
        def submit(some: Ask, ended: Callable[[], None]) -> Future[Worked[str | None]]:
            return self._threads.submit(copy_context().run, self._train, some, ended)

        return self._dealer.train(self._run.folder, ask, submit, trained)

    def evaluate(self, number: int, parts: Sequence[Part]) -> Sequence[Scores]:
        places = {part: place for place, part in enumerate(parts)}

        def submit(some: Sequence[Part], ended: Callable[[], None]) -> Future[Worked[Scores]]:
            return self._threads.submit(copy_context().run, score, some, ended)

        def score(some: Sequence[Part], ended: Callable[[], None]) -> Worked[Scores]:
            name = f"round {number} {named('part', [places[part] for part in some])} evaluate"
            answer = self._answer(_EVALUATE, name, self._depot.scoring(number, some))
            for _ in some:
                ended()
            return Worked(answer.scores, answer.each_s)

        return self._dealer.deal(parts, lambda part: part.split, submit)

    def _train(self, some: Ask, ended: Callable[[], None]) -> Worked[str | None]:
        """Have clients trained whose updates are not there; why each that could not, could not."""
        folder = self._run.folder
        missing = {c for c in some.clients if folder.read_record(folder.client_stem(some.round, c)) is None}
        cohorts = together.cohorts(some.clients, together.size(folder))  # whole: the last bits depend on who is in one
        todo = tuple(client for each in cohorts if missing & set(each) for client in each)
        why: dict[int, str | None] = {}
        each_s = None
        if todo:
            request = self._depot.training(Ask(some.round, some.attempt, todo))
            try:
                answer = self._answer(_TRAIN, f"round {some.round} {named('client', todo)} fine-tune", request)
            except WorkerError as error:
                why = dict.fromkeys(todo, str(error))
            else:
                self._depot.take(request, answer)
                why, each_s = dict(zip(todo, answer.why, strict=True)), answer.each_s
        for _ in some.clients:
            ended()
        return Worked([why.get(client) for client in some.clients], each_s)

    def _answer(self, work: Task[Any, Any], name: str, request: Request) -> Answer:
        """What a worker answers to a request; asked again where the worker was lost, or lacks files.

        Raises:
            WorkerError: it was lost each time, more often than `runner.retries`.
        """
        log, lost, supplied = get_run_logger(), 0, 0
        while True:
            future = self._submitted(work.with_options(task_run_name=name), request)
            try:
                self._wait(future)
                answer: Answer = future.result()
            except self._engine.lost as error:
                if self._closing:
                    raise RunAborted("stopped") from None
                lost += 1
                _mark_crashed(future.task_run_id, error)
                if lost > self._runner.retries:
                    raise WorkerError(
                        f"{name}: its worker was lost {counted(lost, 'time')} ({first_line(error)}); see whether the "
                        "machines of the cluster have enough memory"
                    ) from None
                log.warning("%s: its worker was lost (%s); asked again", name, type(error).__name__)
                continue
            finally:
                self._under_way.discard(future)
            if answer.absent and supplied < _MOST_SUPPLIED:
                request, supplied = self._depot.supply(request, answer.absent), supplied + 1
                continue
            if answer.absent:
                raise WorkerError(
                    f"{name}: {answer.worker} cannot get {counted(len(answer.absent), 'file')} out of the store of "
                    f"{self._runner.kind}, which were put there {counted(supplied, 'time')}"
                )
            self._note(answer)
            for line in answer.said:
                log.warning("%s", line)
            return answer

    def _submitted(self, work: Task[Any, Any], request: Request) -> Any:
        known = FlowRunContext.get()
        assert known is not None
        with known.model_copy(update={"flow": _STAND_IN}), self._lock:
            if self._closing:
                raise RunAborted("stopped")
            future = self._engine.submit(work, {"request": replace(request, quiet=_QUIET)})
            self._under_way.add(future)
            return future

    def _wait(self, future: Any) -> None:
        """Until it has come to an end, with a word where no machine has room for it."""
        while not self._engine.wait(future, _WORD_S):
            if not self._engine.slots():
                get_run_logger().warning(
                    "waiting for a machine: the cluster has none with room for a client now (%s)",
                    self._engine.resources() or "no machine at all",
                )

    def _note(self, answer: Answer) -> None:
        with self._lock:
            found = self.crossed.setdefault(answer.worker, Crossed())
            found.pieces += len(answer.why) or len(answer.scores)
            found.fetched += answer.fetched
            found.sent += sum(len(sent.tensors) + len(sent.record) for sent in answer.sent)
            found.memory = max(found.memory, answer.memory)

    def publish(self) -> None:
        """With a table of who has done how much, beside the others."""
        rows = [{"worker": worker, **asdict(each)} for worker, each in sorted(self.crossed.items())]
        self._run.folder.write_json("tables/workers.json", rows)
        super().publish()

    def close(self) -> None:
        """Let go of what is under way: whoever waits for it gets a RunAborted."""
        with self._lock:
            self._closing = True
            for future in list(self._under_way):
                with suppress(Exception):
                    self._engine.cancel(future)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def told(self) -> str:
        """A line of what the cluster has done; empty before it has done anything."""
        if not self.crossed:
            return ""
        fetched, sent, memory = (
            [getattr(each, name) / 1e6 for each in self.crossed.values()] for name in ("fetched", "sent", "memory")
        )
        workers_, machines = counted(len(self.crossed), "worker"), counted(self._engine.machines(), "machine")
        return (
            f"{self._runner.kind}: {workers_} on {machines}; each fetched {_range(fetched)} MB, sent {_range(sent)} MB "
            f"and had {_range(memory)} MB of memory"
        )


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.3g}", f"{max(values):.3g}"
    return least if least == most else f"{least} to {most}"


def _mark_crashed(task_run: Any, error: Exception) -> None:
    """On Prefect's pages the task run would go on for ever: who should have said that it ended has gone."""
    with suppress(Exception), get_client(sync_client=True) as client:
        client.set_task_run_state(task_run, Crashed(message=f"Its worker was lost: {first_line(error)}"), force=True)
