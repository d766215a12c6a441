"""Dask, through prefect-dask."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from dask.base import annotate
from distributed import wait
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker
from prefect import Task
from prefect_dask.task_runners import DaskTaskRunner

from fedlora.config import RunnerConfig
from fedlora.errors import WorkerError, first_line
from fedlora.run import mirror
from fedlora.run.request import Held
from fedlora.run.stores import InDask
from tasks.engines.base import T, cores

_CPU, _GPU = "CPU", "GPU"


class DaskEngine:
    """A cluster of Dask's. A worker process of it trains one client at a time, however many threads it has."""

    lost = (KilledWorker, CancelledError, CommClosedError)

    def __init__(self, runner: RunnerConfig) -> None:
        self._runner = runner
        asked = {_CPU: runner.cpus_per_client, _GPU: runner.gpus_per_client}
        usual = {_CPU: 1.0, _GPU: 0.0}
        self._asked = {name: each for name, each in asked.items() if each != usual[name]}
        """Of what workers must say that they have (`dask worker --resources`); a thread is a core without that."""
        self._tasks: Any = DaskTaskRunner(address=runner.address, cluster_kwargs=self._local(runner))
        self._tasks.__enter__()
        self._client: Any = self._tasks.client

    def _local(self, runner: RunnerConfig) -> dict[str, Any] | None:
        if runner.address:
            return None
        return {
            "n_workers": runner.slots or max(1, int(cores() / runner.cpus_per_client)),
            "threads_per_worker": 1,
            "host": "127.0.0.1",
            "dashboard_address": None,
            "memory_limit": None,  # Dask would end a process at its share of the memory, whatever there is
            "resources": self._asked or None,
        }

    def warm_up(self) -> None:
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        self._warm = [self._client.submit(mirror.warm_up, workers=[each], pure=False) for each in workers]

    def submit(self, task: Task[Any, Any], parameters: dict[str, Any]) -> Any:
        with annotate(**({"resources": self._asked} if self._asked else {})):
            return self._tasks.submit(task, parameters)

    def wait(self, future: Any, seconds: float) -> bool:
        try:
            with self._client.as_current():
                wait([future.wrapped_future], timeout=seconds)  # type: ignore[no-untyped-call]
        except TimeoutError:
            return False
        except CancelledError:  # which its result will say
            return True
        return True

    def cancel(self, future: Any) -> None:
        future.wrapped_future.cancel()

    def put(self, content: bytes) -> Held:
        return InDask(self._client.scatter([content], hash=False)[0])

    def slots(self) -> int:
        room = sum(
            all(worker["resources"].get(n, 0) >= each for n, each in self._asked.items()) for worker in self._all()
        )
        return min(room, self._runner.slots or room)

    def machines(self) -> int:
        return len(self.hosts())

    def hosts(self) -> set[str]:
        return {worker["host"] for worker in self._all()}

    def there(self, host: str, function: Callable[..., T], *args: Any) -> T:
        found: T = self._client.submit(function, *args, workers=[host], pure=False).result()
        return found

    def resources(self) -> str:
        """What the workers have, in words."""
        return "; ".join(
            f"{worker['name']} says that it has {worker['resources'] or 'nothing'}" for worker in self._all()
        )

    def _all(self) -> list[dict[str, Any]]:
        return list(self._client.scheduler_info(n_workers=-1)["workers"].values())

    def close(self) -> None:
        self._tasks.__exit__(None, None, None)


def connect(runner: RunnerConfig) -> DaskEngine:
    """Connect to a cluster, or start a local one.

    Raises:
        WorkerError: it does not answer, or has other versions.
    """
    try:
        return DaskEngine(runner)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"runner.address={runner.address}" if runner.address else "a local cluster"
        raise WorkerError(f"Dask at {where} cannot be used: {first_line(error)}") from error
