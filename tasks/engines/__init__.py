"""Clusters that train clients, through Prefect's own task runners: one file an engine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fedlora.config import RunnerConfig
from tasks.engines.base import Engine, open_engine

_shared: dict[str, tuple[Engine, int]] = {}
_lock = threading.Lock()

__all__ = ["Engine", "current", "opened"]


@contextmanager
def opened(runner: RunnerConfig) -> Iterator[Engine]:
    """The engine for this runner in this process: opened by the first who asks, closed when the last one leaves, so
    that a sweep keeps it, and the base models in its processes, from one run to the next.

    Raises:
        ConfigError: the cluster has no room for a client.
        WorkerError: it does not answer.
    """
    key = _key(runner)
    with _lock:
        engine, users = _shared.get(key) or (open_engine(runner), 0)
        _shared[key] = (engine, users + 1)
    try:
        yield engine
    finally:
        with _lock:
            engine, users = _shared.pop(key)
            if users > 1:
                _shared[key] = (engine, users - 1)
        if users == 1:
            engine.close()


def current(runner: RunnerConfig) -> Engine:
    """The engine that is open for this runner.

    Raises:
        KeyError: none is open in this process.
    """
    return _shared[_key(runner)][0]


def _key(runner: RunnerConfig) -> str:
    return runner.model_dump_json(include={"kind", "slots", "address", "device", "gpus_per_client", "cpus_per_client"})
