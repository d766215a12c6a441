"""A device is held by one client at a time, across runs, by a limit on a real Prefect server."""

import threading
import time

import pytest
from prefect.client.orchestration import get_client

from fedlora.config import RunnerConfig
from tasks import devices


def test_gpus_are_exclusive_by_default_and_the_cpu_on_request():
    assert devices.is_exclusive(RunnerConfig(), "cuda:1")
    assert not devices.is_exclusive(RunnerConfig(), "cpu")
    assert devices.is_exclusive(RunnerConfig(exclusive=True), "cpu")
    assert not devices.is_exclusive(RunnerConfig(exclusive=False), "cuda:0")
    assert devices.limit_name("cuda:0") != devices.limit_name("cuda:1")


def test_two_runs_on_one_device_take_turns(prefect_server):
    runner = RunnerConfig(exclusive=True)
    devices.ensure_limits(["cpu", "cpu"])
    spans: list[tuple[float, float]] = []

    def client() -> None:
        with devices.held(runner, "cpu"):
            begun = time.monotonic()
            time.sleep(0.5)
            spans.append((begun, time.monotonic()))

    threads = [threading.Thread(target=client) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=90)
    first, second = sorted(spans)
    assert first[1] <= second[0]


def test_a_limit_that_somebody_changed_is_left_alone(prefect_server):
    devices.ensure_limits(["cuda:7"])
    name = devices.limit_name("cuda:7")
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(name, 3)
        devices.ensure_limits(["cuda:7"])
        assert client.read_global_concurrency_limit_by_name(name).limit == 3


def test_a_missing_limit_is_an_error_and_not_a_free_pass(prefect_server):
    with (
        pytest.raises(Exception, match=r"(?i)limit|strict"),
        devices.held(RunnerConfig(exclusive=True), "cuda:nowhere"),
    ):
        pytest.fail("entered without a limit")


def test_a_gpu_has_one_limit_whatever_a_process_calls_it(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    second = devices.limit_name("cuda:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 3")
    assert devices.limit_name("cuda:0") == second
    assert devices.limit_name("cuda:1").endswith("cuda-3")
    assert devices.limit_name("cpu").endswith("-cpu")
