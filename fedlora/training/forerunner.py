"""A process that imports what jobs need, once: the worker processes of CPU slots are forked from it.

Imports of torch, transformers and PEFT take seconds of processor time, and every worker would need them again; a fork
takes milliseconds, and shares the memory of what was imported. The process is Python's own fork server: it starts from
nothing and runs no job, so that no thread, lock or GPU context of anybody's is copied into a worker. Only on Linux:
elsewhere forking is not safe once Apple's libraries are loaded. A GPU's worker starts from nothing, as CUDA wants it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import BaseContext

_PRELOAD = ["fedlora.run.preloaded"]
_FREE = ("FEDLORA_", "PREFECT_", "MLFLOW_", "PYTEST_", "TORCHINDUCTOR_")
"""Variables that are read when they are used, not when a library is imported; torch sets the last by itself."""

_begun_with: dict[str, str] | None = None
_lock = threading.Lock()


def begin() -> None:
    """Let the imports begin in the background, if this system can fork and they have not begun. Needs no heavy import.

    To be called when environment variables are as they shall be. The process ends when this one does.
    """
    if sys.platform != "linux":
        return
    from multiprocessing import forkserver

    global _begun_with
    with _lock, _without_ctrl_c():
        if _begun_with is None:
            _begun_with = _frozen(os.environ)
            multiprocessing.set_forkserver_preload(_PRELOAD)
        forkserver.ensure_running()  # again, if it died


def context(device: str) -> BaseContext:
    """How the worker process of a device is to be started."""
    if device != "cpu" or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    begin()
    if _frozen(os.environ) != _begun_with:  # what was imported has read other settings
        return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("forkserver")


def _frozen(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(_FREE)}


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """What is started within does not get the terminal's Ctrl-C: its imports would end in a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
