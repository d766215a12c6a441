"""Ray, through prefect-ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run tells nobody of itself

import ray
from prefect import Task
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options
from ray.exceptions import RayError

from fedlora.config import RunnerConfig
from fedlora.errors import WorkerError, first_line
from fedlora.run import mirror
from fedlora.run.request import Held
from fedlora.run.stores import InRay
from tasks.engines.base import T, cores


class RayEngine:
    """A cluster of Ray's."""

    lost = (RayError,)

    def __init__(self, runner: RunnerConfig) -> None:
        self._runner = runner
        self._tasks: RayTaskRunner[Any] = RayTaskRunner(runner.address, _init(runner))
        self._tasks.__enter__()

    def _options(self) -> dict[str, Any]:
        """No retries of Ray's own: what is lost is asked for again where it can be counted and told. A process keeps
        its base model from one client to the next, also on a GPU."""
        each = {"num_cpus": self._runner.cpus_per_client, "num_gpus": self._runner.gpus_per_client}
        return {**each, "max_retries": 0, "max_calls": 0}

    def warm_up(self) -> None:
        begin = ray.remote(**self._options())(mirror.warm_up)
        for _ in range(self.slots()):
            begin.remote()

    def submit(self, task: Task[Any, Any], parameters: dict[str, Any]) -> Any:
        with remote_options(**self._options()):
            return self._tasks.submit(task, parameters)

    def wait(self, future: Any, seconds: float) -> bool:
        return bool(ray.wait([future.wrapped_future], timeout=seconds)[0])

    def cancel(self, future: Any) -> None:
        ray.cancel(future.wrapped_future)

    def put(self, content: bytes) -> Held:
        return InRay(ray.put(content))

    def slots(self) -> int:
        runner = self._runner
        asked = {"CPU": runner.cpus_per_client, "GPU": runner.gpus_per_client}
        room = sum(
            min(int(node["Resources"].get(name, 0) / each + 1e-9) for name, each in asked.items() if each)
            for node in _alive()
        )
        return min(room, runner.slots or room)

    def machines(self) -> int:
        return len(_alive())

    def hosts(self) -> set[str]:
        return {node["NodeManagerAddress"] for node in _alive()}

    def there(self, host: str, function: Callable[..., T], *args: Any) -> T:
        found: T = ray.get(ray.remote(resources={f"node:{host}": 0.001})(function).remote(*args))
        return found

    def resources(self) -> str:
        """What the machines have, in words."""
        return "; ".join(
            f"{node['NodeManagerHostname']} has {node['Resources'].get('CPU', 0):g} CPUs and "
            f"{node['Resources'].get('GPU', 0):g} GPUs"
            for node in _alive()
        )

    def close(self) -> None:
        self._tasks.__exit__(None, None, None)


def _alive() -> list[dict[str, Any]]:
    nodes: Any = ray.nodes
    return [node for node in nodes() if node["Alive"]]


def _init(runner: RunnerConfig) -> dict[str, Any]:
    """Arguments of `ray.init`. Processes see all GPUs, and each is told which of them is its own: what Ray would hide
    changes from task to task, and a process of torch's cannot follow."""
    common = {
        "log_to_driver": False,
        "logging_level": "error",
        "runtime_env": {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "OMP_WAIT_POLICY": "PASSIVE"}},
    }
    if runner.address:
        return common
    slots = runner.slots or max(1, int(cores() / runner.cpus_per_client))
    local = {"num_cpus": slots * runner.cpus_per_client, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    return common | local


def connect(runner: RunnerConfig) -> RayEngine:
    """Connect to a cluster, or start a local one.

    Raises:
        WorkerError: it does not answer, or has other versions.
    """
    try:
        return RayEngine(runner)
    except (RayError, RuntimeError, ConnectionError, ValueError, OSError) as error:
        where = f"runner.address={runner.address}" if runner.address else "a local cluster"
        raise WorkerError(f"Ray at {where} cannot be used: {first_line(error)}") from error
