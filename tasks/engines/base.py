"""What is asked of an engine."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import psutil
from prefect import Task
from prefect.settings import PREFECT_API_URL

from fedlora.config import RunnerConfig
from fedlora.errors import ConfigError
from fedlora.run import mirror
from fedlora.run.request import Held

T = TypeVar("T")


class Engine(Protocol):
    """A cluster, connected."""

    lost: tuple[type[Exception], ...]
    """What `result()` of a future raises where the process or the machine that worked on it has gone."""

    def warm_up(self) -> None:
        """Let processes begin with their imports; nothing waits for it."""

    def submit(self, task: Task[Any, Any], parameters: dict[str, Any]) -> Any:
        """A future of Prefect's for a task run on the cluster; to be called within a flow run."""

    def wait(self, future: Any, seconds: float) -> bool:
        """Wait for a future for so long; whether it has come to an end."""

    def cancel(self, future: Any) -> None:
        """Let go of what nobody waits for any more."""

    def put(self, content: bytes) -> Held:
        """Put bytes into the engine's store."""

    def slots(self) -> int:
        """How many clients it has room for side by side, as it is now; 0 while none."""

    def machines(self) -> int:
        """How many machines it has now."""

    def hosts(self) -> set[str]:
        """Their addresses."""

    def there(self, host: str, function: Callable[..., T], *args: Any) -> T:
        """What a function comes to in a worker on a machine."""

    def resources(self) -> str:
        """What the machines have, in words."""

    def close(self) -> None:
        """Leave the cluster; a local one ends."""


def open_engine(runner: RunnerConfig) -> Engine:
    """Connect to a cluster, or start a local one.

    Raises:
        ConfigError: it has no room for a client.
        WorkerError: it does not answer.
    """
    found = importlib.import_module(f"tasks.engines.{runner.kind}")
    engine: Engine = found.connect(runner)
    try:
        _check_room(runner, engine)
        _check_reachable(engine)
        engine.warm_up()
    except BaseException:
        engine.close()
        raise
    return engine


def _check_reachable(engine: Engine) -> None:
    """Whether workers on other machines reach the Prefect server: each of them reports to it by itself."""
    url = PREFECT_API_URL.value() or ""
    place = urlsplit(url)
    if not place.hostname or not place.port:
        return
    here = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    for host in sorted(engine.hosts() - here - {"localhost"}):
        if not engine.there(host, mirror.reaches, place.hostname, place.port):
            raise ConfigError(
                f"the cluster's machine {host} does not reach the Prefect server at {url}. Give workers an address "
                "that they reach (`fedlora up --host` with the address of this machine, or PREFECT_API_URL), or bring "
                "the port over with ssh"
            )


def _check_room(runner: RunnerConfig, engine: Engine) -> None:
    if engine.machines() and not engine.slots():
        each = f"runner.cpus_per_client={runner.cpus_per_client:g}"
        if runner.gpus_per_client:
            each += f" and runner.gpus_per_client={runner.gpus_per_client:g}"
        raise ConfigError(
            f"no machine of the cluster has room for a client with {each}; {engine.resources()}. Ask for less, or add "
            "a machine that has as much"
        )


def cores() -> int:
    """Of this machine, that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
