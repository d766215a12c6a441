"""A worker process and the pipe to it: it does one job at a time, can be ended at any moment, ends with its parent.

Pools of processes that end a job by its time (pebble 5, the executors of the standard library and of loky) are broken
for good by a worker that dies while idle, and throw away an answer that comes as its time runs out.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from fedlora.errors import RunAborted
from fedlora.training import forerunner

T = TypeVar("T")

_LEAVE_WITHIN_S = 3
_BEGIN_WITHIN_S = 300
"""Where jobs have a time, it counts from the moment the process begins them; so long it may take to start."""

_DIED = "died (killed, or out of memory: try fewer runner.slots or a smaller training.batch_size)"


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


@dataclass(frozen=True)
class Outcome:
    """What came of a job: a value, or the error that it raised."""

    value: Any = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Lost:
    """The process died, or was ended, before it had answered."""

    why: str
    begun: bool
    """Whether it had begun with the job: if not, another process may be given it as if nothing had happened."""


class WorkerProcess:
    """A process of its own, started now."""

    _starting = threading.Lock()

    def __init__(self, device: str, threads: int) -> None:
        context: Any = forerunner.context(device)
        self._pipe, theirs = context.Pipe()
        # The environment is given along: a process that is forked has that of the one it was forked from.
        given = (theirs, device, threads, dict(os.environ))
        self._process = context.Process(target=_serve, args=given, name="fedlora worker", daemon=True)
        self._in_use, self._ending, self._ended = threading.Lock(), threading.Lock(), False
        with self._starting, theirs:
            self._process.start()

    def alive(self) -> bool:
        """Whether it still runs."""
        return bool(self._process.is_alive())

    def work(
        self, seconds: float | None, job: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Outcome | Lost:
        """Hand a job over and wait for what comes of it; one that takes longer than `seconds` costs the process.

        What is ready at that moment counts, however close it was.
        """
        content = bytes(ForkingPickler.dumps((job, args, dict(kwargs))))
        with self._in_use:
            return self._answer(content, seconds)

    def _answer(self, content: bytes, seconds: float | None) -> Outcome | Lost:
        try:
            self._pipe.send_bytes(content)
        except OSError:
            return Lost(_DIED, begun=False)
        try:
            if not self._speaks_within(None if seconds is None else _BEGIN_WITHIN_S):
                return Lost(f"did not begin within {_BEGIN_WITHIN_S} s", begun=False)
            self._pipe.recv()
        except (EOFError, OSError):
            return Lost(_DIED, begun=False)
        why = _DIED
        try:
            if not self._speaks_within(seconds):
                why = f"was ended after {seconds} s (runner.timeout_s)"
                self._process.kill()
                self._process.join()
            answer: Outcome = self._pipe.recv()
            return answer
        except (EOFError, OSError):
            return Lost(why, begun=True)

    def _speaks_within(self, seconds: float | None) -> bool:
        """Whether there is something in the pipe, if only its end, within so many seconds."""
        return bool(wait([self._pipe, self._process.sentinel], seconds))

    def end(self, *, now: bool) -> None:
        """End it; `now` asks it to leave the job under way and kills it after seconds, otherwise it must be idle.

        Several threads may call this at the same time, as they do when a run is stopped while one waits for a job: the
        pipe is closed once, and never under somebody who still reads from it.
        """
        with self._ending:
            if self._ended:
                return
            if now:
                self._process.terminate()
            else:
                with self._in_use:
                    self._pipe.close()
            self._process.join(_LEAVE_WITHIN_S)
            self._process.kill()
            self._process.join()
            with self._in_use:  # whoever waited for a job sees that the process has ended
                self._pipe.close()
            self._ended = True


# -- in the process

_at_work = False
_leaving = False


def _serve(pipe: Connection, device: str, threads: int, environ: Mapping[str, str]) -> None:
    """Set up a worker process, its device, its threads and its end with the parent; do jobs until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _break_off)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.clear()
    os.environ.update(environ)
    use_threads(threads)
    # Progress bars (of `datasets`) would take a semaphore of the system, which a process that is ended leaves behind.
    tqdm.set_lock(threading.RLock())
    bench = Workbench(device)
    while not _leaving:
        try:
            content = pipe.recv_bytes()
            pipe.send(True)
            pipe.send(_outcome(bench, content))
        except (EOFError, OSError, RunAborted):  # nobody is there any more, or it was asked to leave
            break
    gc.freeze()  # otherwise the interpreter looks through all that was imported once more, before it ends


def _outcome(bench: Workbench, content: bytes) -> Outcome:
    global _at_work
    try:
        _at_work = True
        job, args, kwargs = ForkingPickler.loads(content)  # what our own parent wrote into our pipe
        return Outcome(job(bench, *args, **kwargs))
    except BaseException as error:
        return Outcome(error=_portable(error))
    finally:
        _at_work = False


def _portable(error: BaseException) -> BaseException:
    """The error with its traceback here as a note; where it cannot travel between processes, its text."""
    told = traceback.format_exc().rstrip()
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(f"In the worker process:\n{told}")
    return error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _break_off(signum: int, frame: Any) -> None:
    """Leave the job under way, and end; an idle worker has nothing to leave."""
    global _leaving
    _leaving = True
    if _at_work:
        raise RunAborted("stopped")
    os._exit(0)
