"""Servers that really go away in the middle of a run and come back: it goes on, and nothing is lost or doubled."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from fedlora.errors import TrackingError
from fedlora.run import rounds
from fedlora.run.runfolder import RunFolder
from flows.federated import federated
from mlflow_tracking import tracker
from tasks import outages

ROOT = Path(__file__).parents[2]
ROUNDS = 12


class Server:
    """A server on loopback that can be killed and started again on the same port and database."""

    def __init__(self, command: list[str], health: str, folder: Path, told: bytes = b"") -> None:
        """`told` is what the process is to read from its standard input."""
        self._command, self._health, self._folder, self._told = command, health, folder, told

    def start(self) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
        environ |= {
            "FEDLORA_HOME": str(self._folder),
            "PREFECT_HOME": str(self._folder / "prefect"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{self._folder / 'prefect.db'}",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes more, which outlive a killed server
        }
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=environ,
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._process.stdin.write(self._told)
        self._process.stdin.flush()

    def answers(self) -> bool:
        try:
            return httpx.get(self._health, timeout=2, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()


def begin(both: list[Server]) -> None:
    for server in both:
        server.start()
    for server in both:
        until(server.answers)


@contextmanager
def running(server: Server):
    begin([server])
    yield server
    server.kill()


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def folder(with_databases, tmp_path_factory):
    return with_databases(tmp_path_factory.mktemp("servers"))


@pytest.fixture(scope="module")
def prefect(free_ports, folder):
    """Prefect's server, and its address."""
    port, _ = free_ports()
    serve = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from deployments.local.private_server import serve; serve()"
    )
    told = f"{port} {folder / 'prefect.log'}\n".encode()
    address = f"http://127.0.0.1:{port}/api"
    with running(Server([sys.executable, "-c", serve], f"{address}/health", folder, told)) as server:
        yield server, address


@pytest.fixture(scope="module")
def mlflow(free_ports, folder):
    """MLflow's server, and its address."""
    port, _ = free_ports()
    words = ["--port", str(port), "--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    address = f"http://127.0.0.1:{port}"
    with running(Server([sys.executable, "-m", "mlflow", "server", *words], f"{address}/health", folder)) as server:
        yield server, address


@pytest.mark.system
@pytest.mark.timeout(600)
def test_both_servers_go_away_and_come_back(prefect, mlflow, tiny, tmp_path):
    (one, prefect), (other, mlflow) = prefect, mlflow
    both = [one, other]
    folder, seen = tmp_path / "run", []
    overrides = {**tiny, "rounds": ROUNDS, "tracking.uri": mlflow, "tracking.adapter_every": 4, "keep_rounds": 1}

    def disturb():
        def closed(number):
            return (folder / f"rounds/{number:03d}/record.json").exists()

        until(lambda: closed(2))
        for server in both:
            server.kill()
        try:
            until(lambda: closed(ROUNDS - 3))  # it goes on without them
            seen.append(tracker.load(RunFolder(folder)).logged)
        finally:  # whatever happened: the run waits for them
            begin(both)

    trouble = threading.Thread(target=disturb)
    trouble.start()
    with temporary_settings({PREFECT_API_URL: prefect, PREFECT_CLIENT_MAX_RETRIES: 8}):
        federated(preset="demo", overrides=overrides, run_dir=str(folder))
        trouble.join()
        with get_client(sync_client=True) as client:
            assert [run.state.name for run in client.read_flow_runs()] == ["Completed"]
    assert seen, "the run waited for the servers"
    assert seen[0] < ROUNDS - 3  # some waited in the run folder
    tracked = tracker.load(RunFolder(folder))
    store_client = MlflowClient(mlflow)
    assert store_client.get_run(tracked.run).info.status == "FINISHED"
    assert len(store_client.search_runs([tracked.experiment])) == 1
    for record in rounds.records(RunFolder(folder)):
        for name, value in record.metrics.items():
            points = [p for p in store_client.get_metric_history(tracked.run, name) if p.step == record.round]
            assert [(p.value, p.timestamp) for p in points] == [(value, record.timestamp_ms)], name
    logged = {item.path for item in store_client.list_artifacts(tracked.run, "adapter")}
    assert {f"adapter/round-{number:03d}" for number in (4, 8, 12)} <= logged  # rounds that waited kept what they need


def test_a_run_that_ends_without_mlflow_is_complete_and_delivered_later(
    mlflow, finished, as_new, tmp_path, monkeypatch
):
    server, address = mlflow
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    run = as_new(finished(), tmp_path / "run")
    tracked = tracker.start(run, "a run")
    server.kill()
    tracked, waits = tracker.offer(run, tracked)
    assert tracked.logged == -1
    assert "does not answer" in waits
    with pytest.raises(TrackingError, match=rf"the run is complete in {run.path}, but not in MLflow: .*fedlora resume"):
        tracker.finish(run, tracked, "note", patience_s=0.1)
    assert tracker.start(run, "a run") == tracked  # it is the same run, also while the store is away
    threading.Thread(target=server.start).start()
    tracker.finish(run, tracked, "note")
    assert MlflowClient(address).get_run(tracked.run).info.status == "FINISHED"
    assert tracker.load(run).logged == 2


@pytest.mark.timeout(120)  # MLflow by itself would try for four minutes
def test_a_store_that_goes_away_between_two_requests_is_not_waited_for(finished, as_new, tmp_path, monkeypatch):
    run = as_new(finished(), tmp_path / "run")
    tracked = replace(tracker.start(run, "a run"), uri="http://127.0.0.1:9")
    monkeypatch.setattr("mlflow_tracking.store.check", lambda uri: None)  # just now it was there
    kept, waits = tracker.offer(run, tracked)
    assert kept.logged == -1
    assert "refused" in waits


def test_what_only_a_page_shows_is_tried_and_left(prefect_server):
    calls = []

    def fails():
        calls.append(1)
        raise httpx.ConnectError("refused")

    assert not outages.optional(fails)
    assert calls == [1]
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert not outages.optional(lambda: calls.append(2))
    assert calls == [1]
    assert outages.optional(lambda: calls.append(3))
    assert calls == [1, 3]
    with pytest.raises(ValueError, match="a defect of ours"):
        outages.optional(lambda: (_ for _ in ()).throw(ValueError("a defect of ours")))
