"""Where jobs run: slots, each with a device and a resident base model, in worker processes or in this process.

A job is a function whose first argument is the slot's `Workbench`; the others are paths and small numbers, so that
nothing large is copied between processes.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from fedlora.config import RunnerConfig
from fedlora.errors import ConfigError, RunAborted, WorkerError

P = ParamSpec("P")
T = TypeVar("T")

_MOST_CPU_SLOTS = 8
_LEAVE_WITHIN_S = 3


@dataclass
class Workbench:
    """What stays in memory in one slot between jobs: `keep` holds the latest value of each kind, by key."""

    device: str
    kept: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def keep(self, kind: str, key: Any, make: Callable[[], T]) -> T:
        """The value made for `key` before, or a new one that replaces the last of its kind."""
        if kind in self.kept and self.kept[kind][0] == key:
            value: T = self.kept[kind][1]
            return value
        return self.renew(kind, key, make)

    def renew(self, kind: str, key: Any, make: Callable[[], T]) -> T:
        """A new value for `key` in place of whatever was kept (which is let go first: two models may not fit)."""
        self.kept.pop(kind, None)
        value = make()
        self.kept[kind] = (key, value)
        return value


def use_threads(number: int) -> None:
    """Let torch compute with so many threads: the bits of a result depend on it.

    To be called where the work is done: a thread of Python that has not said so itself has a number of its own.
    """
    torch.set_num_threads(number)


Job = Callable[Concatenate[Workbench, P], T]

_bench: Workbench | None = None


def _enter_worker(device: str, threads: int) -> None:
    """Set up a worker process: its device, its threads, and its end when the parent ends."""
    global _bench
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _break_off)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_threads(threads)
    _bench = Workbench(device)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


_at_work = False


def _break_off(signum: int, frame: Any) -> None:
    """Leave the job under way; an idle worker has nothing to leave, and ends when its executor shuts down."""
    if _at_work:
        raise RunAborted("stopped")


def _in_worker(job: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    global _at_work
    assert _bench is not None, "a job reached a process that was not set up as a worker"
    _at_work = True
    try:
        return job(_bench, *args, **kwargs)
    finally:
        _at_work = False


class ProcessSlot:
    """A worker process of its own; a new one takes its place if it dies."""

    def __init__(self, device: str, threads: int) -> None:
        self.device, self._threads, self._closed = device, threads, False
        self._executor = self._start()

    def _start(self) -> Executor:
        return ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_enter_worker, initargs=(self.device, self._threads)
        )

    def run(self, job: Job[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `job(workbench, *args)` in the worker process and wait for its result.

        Raises:
            WorkerError: the process died; the job may be tried again.
        """
        return self.run_within(None, job, *args, **kwargs)

    def run_within(self, seconds: float | None, job: Job[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same; a process that takes longer than `seconds` is taken for hung and ended.

        Raises:
            WorkerError: the process died, or was ended; the job may be tried again.
        """
        future = self._submit(job, args, kwargs)
        try:
            return future.result(seconds)
        except BrokenProcessPool:
            why = "died (killed, or out of memory: try fewer runner.slots or a smaller training.batch_size)"
        except FutureTimeout:
            if future.done():
                raise  # the job's own
            for process in self._processes():
                process.kill()
            why = f"was ended after {seconds} s (runner.timeout_s)"
        if self._closed:
            raise RunAborted("stopped")
        self._executor.shutdown()
        self._executor = self._start()
        raise WorkerError(f"the worker process on {self.device}, during {job.__name__}{args[1:]}, {why}")

    def _processes(self) -> list[Any]:
        return list((getattr(self._executor, "_processes", None) or {}).values())

    def _submit(self, job: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Future[T]:
        if self._closed:
            raise RunAborted("stopped")
        return self._executor.submit(_in_worker, job, args, kwargs)

    def start(self, job: Job[[], None]) -> None:
        """Let the worker begin `job(workbench)` without waiting for it."""
        self._submit(job, (), {})

    def close(self, *, now: bool = False) -> None:
        """End the worker; `now` does not wait for the job under way: it is asked to leave it, then killed."""
        self._closed = True
        processes = self._processes() if now else []
        for process in processes:
            process.terminate()
        self._executor.shutdown(wait=not now, cancel_futures=True)
        for process in processes:
            process.join(_LEAVE_WITHIN_S)
            process.kill()
        self._executor.shutdown()


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

    def close(self, *, now: bool = False) -> None:
        """Let go of the base model."""
        self._bench.kept.clear()


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

    def close(self, *, now: bool = False) -> None:
        """End the workers; `now` does not wait for jobs under way."""
        for slot in self.slots:
            slot.close(now=now)


def slot_devices(runner: RunnerConfig) -> list[str]:
    """The device of each slot: with several GPUs, each slot owns one.

    Raises:
        ConfigError: a device that is not there, or more slots than GPUs.
    """
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
    return _shared[_pool_key(runner)][0]


def _pool_key(runner: RunnerConfig) -> str:
    return runner.model_dump_json(include={"kind", "slots", "device", "threads"})
