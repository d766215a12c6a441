"""Where jobs run: slots, each with a device and a resident base model, in worker processes or in this process.

A job is a function whose first argument is the slot's `Workbench`; the others are paths and small numbers, so that
nothing large is copied between processes.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from fedlora.config import RunnerConfig
from fedlora.errors import ConfigError, RunAborted, WorkerError
from fedlora.training.workerprocess import Lost, Outcome, Workbench, WorkerProcess, use_threads

__all__ = ["Pool", "ProcessSlot", "ThreadSlot", "Workbench", "open_pool", "slot_devices", "use_threads"]

P = ParamSpec("P")
T = TypeVar("T")

_MOST_CPU_SLOTS = 8


Job = Callable[Concatenate[Workbench, P], T]


class ProcessSlot:
    """A worker process of its own; a new one takes its place if it dies, at work or not."""

    def __init__(self, device: str, threads: int) -> None:
        self.device, self._threads, self._closed = device, threads, False
        self._worker: WorkerProcess | None = None
        self._turn = threading.Lock()

    def run(self, job: Job[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `job(workbench, *args)` in the worker process and wait for its result.

        Raises:
            WorkerError: the process died; the job may be tried again.
        """
        return self.run_within(None, job, *args, **kwargs)

    def run_within(self, seconds: float | None, job: Job[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same; a process that works on it longer than `seconds` is taken for hung and ended.

        Raises:
            WorkerError: the process died, or was ended; the job may be tried again.
        """
        with self._turn:
            outcome = self._outcome(seconds, job, args, kwargs)
        if isinstance(outcome, Lost):
            if self._closed:
                raise RunAborted("stopped")
            raise WorkerError(f"the worker process on {self.device}, during {job.__name__}{args[1:]}, {outcome.why}")
        if outcome.error is not None:
            raise outcome.error
        value: T = outcome.value
        return value

    def _outcome(
        self, seconds: float | None, job: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Outcome | Lost:
        """What came of a job. A process that was dead before the job began is replaced, once."""
        lost = Lost("died", begun=False)
        for _ in range(2):
            worker = self._alive()
            try:
                outcome = worker.work(seconds, job, args, kwargs)
            except BaseException:  # whoever waited was interrupted: the answer would be taken for that of the next job
                worker.end(now=True)
                raise
            if isinstance(outcome, Outcome):
                return outcome
            worker.end(now=True)
            lost = outcome
            if lost.begun or self._closed:
                break
        return lost

    def _alive(self) -> WorkerProcess:
        """The worker, or a new one where there is none or it has died."""
        if self._worker is None or not self._worker.alive():
            if self._worker is not None:
                self._worker.end(now=True)
            self._worker = None if self._closed else WorkerProcess(self.device, self._threads)
        if self._closed or self._worker is None:
            if self._worker is not None:  # closed by another thread while this one started it
                self._worker.end(now=True)
            raise RunAborted("stopped")
        return self._worker

    def start(self, job: Job[[], None]) -> None:
        """Let the worker begin `job(workbench)` without waiting for it; what comes of it is nobody's matter."""

        def begin() -> None:
            with suppress(Exception):
                self.run(job)

        threading.Thread(target=begin, daemon=True).start()

    def rest(self) -> None:
        """End the worker, and with it what it has in memory, once it is idle; a new one starts when there is a job."""
        with self._turn:
            if self._worker:
                self._worker.end(now=False)

    def close(self, *, now: bool = False) -> None:
        """End the worker; `now` does not wait for the job under way: it is asked to leave it, then killed."""
        if now:
            self._closed = True
            if worker := self._worker:
                worker.end(now=True)
            return
        with self._turn:
            self._closed = True
            if self._worker:
                self._worker.end(now=False)


class ThreadSlot:
    """This process itself."""

    def __init__(self, device: str, threads: int) -> None:
        self.device, self._threads = device, threads
        self._bench = Workbench(device)

    def run(self, job: Job[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `job(workbench, *args)` here."""
        use_threads(self._threads)
        return job(self._bench, *args, **kwargs)

    def run_within(self, seconds: float | None, job: Job[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same: a thread cannot be ended (so that the configuration refuses a time for it)."""
        return self.run(job, *args, **kwargs)

    def start(self, job: Job[[], None]) -> None:
        """Nothing to begin early: this process would only be kept busy."""

    def rest(self) -> None:
        """Let go of the base model."""
        self._bench.kept.clear()

    def close(self, *, now: bool = False) -> None:
        """Let go of the base model."""
        self.rest()


Slot = ProcessSlot | ThreadSlot


class Pool:
    """A fixed number of slots that jobs borrow."""

    def __init__(self, runner: RunnerConfig) -> None:
        devices = slot_devices(runner)
        kind = ProcessSlot if runner.kind == "processes" else ThreadSlot
        self.slots: list[Slot] = [kind(device, runner.threads) for device in devices]
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in self.slots:
            self._free.put(slot)

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """Borrow a free slot; waits for one."""
        slot = self._free.get()
        try:
            yield slot
        finally:
            self._free.put(slot)

    def run(self, job: Job[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a job in the next free slot."""
        return self.run_within(None, job, *args, **kwargs)

    def run_within(self, seconds: float | None, job: Job[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a job in the next free slot; one that takes longer than `seconds` there is ended."""
        with self.slot() as slot:
            return slot.run_within(seconds, job, *args, **kwargs)

    def start(self, job: Job[[], None]) -> None:
        """Let every worker process begin `job(workbench)` without waiting for it."""
        for slot in self.slots:
            slot.start(job)

    def rest(self) -> None:
        """Let go of what the workers have in memory; they are there again when there is a job."""
        for slot in self.slots:
            slot.rest()

    def close(self, *, now: bool = False) -> None:
        """End the workers; `now` does not wait for jobs under way."""
        for slot in self.slots:
            slot.close(now=now)


def slot_devices(runner: RunnerConfig) -> list[str]:
    """The device of each slot: with several GPUs, each slot owns one. Of a cluster, only of which kind they are: it
    says itself how many there are.

    Raises:
        ConfigError: a device that is not there, or more slots than GPUs.
    """
    if runner.clustered:
        return ["cuda" if runner.gpus_per_client else "cpu"] * (runner.slots or 1)
    if runner.device == "cpu":
        return ["cpu"] * _cpu_slots(runner)
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if runner.device == "mps" or (runner.device == "auto" and not gpus and torch.backends.mps.is_available()):
        if not torch.backends.mps.is_available():
            raise ConfigError("runner.device=mps, but this machine has no Apple GPU; use runner.device=cpu")
        return ["mps"]
    if runner.device == "auto" and not gpus:
        return ["cpu"] * _cpu_slots(runner)
    wanted = [gpu for gpu in gpus if runner.device in ("auto", "cuda", gpu)]
    if not wanted:
        raise ConfigError(
            f"runner.device={runner.device}, but torch sees {', '.join(gpus) or 'no GPU'} here; use runner.device=cpu"
        )
    if runner.slots is not None and runner.slots > len(wanted):
        raise ConfigError(f"runner.slots={runner.slots}, but each slot owns a GPU and there are {len(wanted)}")
    return wanted[: runner.slots]


def _cpu_slots(runner: RunnerConfig) -> int:
    if runner.kind == "threads":
        return 1
    return runner.slots or min(_usable_cores(), _MOST_CPU_SLOTS)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_shared: dict[str, tuple[Pool, int]] = {}
_lock = threading.Lock()


@contextmanager
def open_pool(runner: RunnerConfig) -> Iterator[Pool]:
    """The pool for this runner in this process: opened by the first who asks, closed when the last one leaves.

    A sweep that holds it keeps the workers, and the base models in them, from one run to the next.
    """
    runner = _here(runner)
    key = _pool_key(runner)
    with _lock:
        pool, users = _shared.get(key) or (Pool(runner), 0)
        _shared[key] = (pool, users + 1)
    failed = True
    try:
        yield pool
        failed = False
    finally:
        with _lock:
            pool, users = _shared.pop(key)
            if users > 1:
                _shared[key] = (pool, users - 1)
        if users == 1:
            pool.close(now=failed)


def close_all() -> None:
    """End all open pools at once, jobs under way included: those who wait for them get a RunAborted."""
    with _lock:
        pools = [pool for pool, _ in _shared.values()]
    for pool in pools:
        pool.close(now=True)


def current_pool(runner: RunnerConfig) -> Pool:
    """The pool that is open for this runner.

    Raises:
        KeyError: none is open in this process.
    """
    return _shared[_pool_key(_here(runner))][0]


def _here(runner: RunnerConfig) -> RunnerConfig:
    """What a runner has on this machine: itself, or beside a cluster one process, which prepares data and model."""
    if not runner.clustered:
        return runner
    return RunnerConfig(kind="processes", slots=1, device="cpu", threads=runner.threads)


def _pool_key(runner: RunnerConfig) -> str:
    return runner.model_dump_json(include={"kind", "slots", "device", "threads"})
