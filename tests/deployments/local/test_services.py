"""`fedlora up` with real servers on free loopback ports, in a home of their own; first those that stay for the tests
of `test_automations.py` and, of `down`, `test_stopping.py`."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import psutil
import pytest
from standins import FLOWS, ONE, Live, descendants, eventually, marked, write_flows

from deployments.local import launch, processes
from deployments.local.asking import CPU_POOL
from deployments.local.environment import Services, is_alive, recorded_services, running_services
from deployments.local.processes import ServiceError
from deployments.local.registering import deploy
from deployments.local.services import down, up
from deployments.local.standing import processes as status
from fedlora.errors import ConfigError, FedloraError, TrackingError
from fedlora.files import home

Ports = Callable[[], tuple[int, int]]


def test_up_starts_servers_pool_and_worker(live: Live) -> None:
    page = live.services.prefect_url.removesuffix("/api")
    assert httpx.get(page, follow_redirects=True).text.lstrip().lower().startswith("<!doctype html>")
    assert httpx.get(live.services.mlflow_url).is_success
    pool = httpx.get(f"{live.services.prefect_url}/work_pools/{CPU_POOL}").json()
    assert pool["type"] == "process"
    assert pool["base_job_template"]["variables"]
    assert recorded_services() == running_services() == live.services
    assert [service.state for service in status()] == ["running"] * 3
    assert any(page in line for line in live.said)
    assert any(live.services.mlflow_url in line for line in live.said)


def test_the_deployment_runs_in_its_source_folder(
    live: Live, send: Callable[[str, str, dict[str, object]], object]
) -> None:
    deployment = httpx.get(f"{live.services.prefect_url}/deployments/name/federated/custom").raise_for_status().json()
    url = f"{live.services.prefect_url}/deployments/{deployment['id']}/create_flow_run"
    send("POST", url, {"parameters": {"word": "hello"}})
    trace = home.home() / "trace"
    assert eventually(lambda: trace.exists() and len(trace.read_text().splitlines()) == 3)
    assert trace.read_text().splitlines() == ["hello", str(live.source), live.services.mlflow_url]


def test_artifacts_show_however_they_were_written(live: Live) -> None:
    from mlflow import MlflowClient

    direct, server = MlflowClient(f"sqlite:///{home.mlflow_database()}"), MlflowClient(live.services.mlflow_url)
    experiments = [
        direct.create_experiment("direct", artifact_location=str(home.mlflow_artifacts())),
        server.create_experiment("server"),
    ]
    for experiment in experiments:
        for client in (direct, server):
            run = client.create_run(experiment).info
            client.log_text(run.run_id, "weights", "adapter/file.txt")
            assert run.artifact_uri.startswith((str(home.mlflow_artifacts()), home.mlflow_artifacts().as_uri()))
            query = {"run_uuid": run.run_id, "path": "adapter/file.txt"}
            assert httpx.get(f"{live.services.mlflow_url}/get-artifact", params=query).text == "weights"


def test_an_experiment_that_was_deleted_on_the_server_is_known_before_a_run(live: Live) -> None:
    from mlflow_tracking import store

    client = store.client(live.services.mlflow_url)
    made = client.create_experiment("a & b")
    store.check_experiment(live.services.mlflow_url, "a & b")
    store.check_experiment(live.services.mlflow_url, "never seen")
    client.delete_experiment(made)
    with pytest.raises(TrackingError, match=f"'a & b' was deleted; restore it .*-x {made}"):
        store.check_experiment(live.services.mlflow_url, "a & b")


def test_second_up_reports_and_starts_nothing(live: Live) -> None:
    before = descendants()
    said: list[str] = []
    assert up(report=said.append, source=live.source) == live.services  # the default ports do not matter
    assert eventually(lambda: descendants() == before)  # what a server starts itself for a moment is gone again
    assert "already running" in said[0]
    assert any(live.services.mlflow_url in line for line in said)


def test_up_replaces_what_died_and_what_it_left_behind(live: Live) -> None:
    """A killed MLflow server leaves its web server behind, which holds the port."""
    victim = psutil.Process(live.services.processes["mlflow"][0])
    orphans = victim.children(recursive=True)
    assert orphans
    victim.kill()
    victim.wait()
    assert [service.state for service in status()] == ["running", "stopped", "running"]
    port = int(live.services.mlflow_url.rpartition(":")[2])
    services = up(mlflow_port=port, report=live.said.append, source=live.source)
    live.services, before = services, live.services
    kept = ("prefect", "worker")
    assert {name: services.processes[name] for name in kept} == {name: before.processes[name] for name in kept}
    assert services.mlflow_url == before.mlflow_url
    assert httpx.get(f"{services.mlflow_url}/health").is_success
    assert not any(orphan.is_running() for orphan in orphans)


def test_deploying_a_broken_flow_says_why(live: Live, tmp_path: Path) -> None:
    write_flows(tmp_path, f"import a_module_that_is_missing\n{FLOWS}")
    with pytest.raises(ServiceError, match=r"(?s)cannot register.*a_module_that_is_missing"):
        deploy(live.services.prefect_url, tmp_path)


@pytest.mark.parametrize("which", ["prefect", "mlflow"])
def test_port_in_use_is_refused_and_nothing_is_left(free_ports: Ports, own_home: Path, which: str) -> None:
    before = descendants()
    ports = dict(zip(("prefect", "mlflow"), free_ports(), strict=True))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports[which]))
        taken.listen()
        with pytest.raises(ConfigError, match=rf"port {ports[which]} .* is in use.*--{which}-port \d+") as refused:
            up(ports["prefect"], ports["mlflow"])
    assert "\n" not in str(refused.value)
    assert descendants() == before
    assert not home.services_file().exists()


@pytest.mark.parametrize(("prefect", "mlflow"), [(0, 5000), (4200, 70000), (4200, 4200)])
def test_senseless_ports_are_refused(own_home: Path, prefect: int, mlflow: int) -> None:
    with pytest.raises(ConfigError, match=r"--(prefect|mlflow)-port"):
        up(prefect, mlflow)


def test_missing_flow_is_noticed_before_anything_starts(free_ports: Ports, own_home: Path) -> None:
    with pytest.raises(ServiceError, match=r"deployments/prefect.yaml.* does not exist"):
        up(*free_ports(), source=own_home)
    write_flows(own_home)
    (own_home / "flows" / "federated.py").unlink()
    with pytest.raises(ServiceError, match=r"flows/federated.py.* does not exist"):
        up(*free_ports(), source=own_home)
    assert not home.logs().exists()
    assert not home.services_file().exists()


def test_a_server_that_dies_takes_the_others_with_it(
    free_ports: Ports, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_flows(own_home)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "sqlite:////proc/nowhere/mlflow.db")
    with pytest.raises(FedloraError, match=r"(?s)MLflow server stopped while starting.*/proc/nowhere"):
        up(*free_ports(), report=lambda line: None, source=own_home)
    assert marked() == []
    assert not home.services_file().exists()


@pytest.mark.system
def test_a_server_that_plans_nothing_is_stopped_and_the_service_and_its_line_are_named(
    free_ports: Ports, own_home: Path, with_databases: Callable[[Path], Path]
) -> None:
    """Its database refuses what the scheduler writes; everything else of it works. In parts: a server that dies, above,
    and the last test of `test_automations.py`."""
    write_flows(own_home, declared=f'{ONE.rstrip()[:-1]}, schedules: [{{cron: "0 2 * * *"}}]}}')
    with_databases(own_home)
    refuse = "BEFORE INSERT ON flow_run WHEN NEW.auto_scheduled BEGIN SELECT RAISE(ABORT, 'no plans today'); END"
    with closing(sqlite3.connect(home.prefect_database())) as connection:
        connection.execute(f"CREATE TRIGGER refuse {refuse}")
        connection.commit()
    with pytest.raises(
        ServiceError, match=r"plans no runs of custom: its service schedule_.*no plans today"
    ) as refused:
        up(*free_ports(), report=lambda line: None, source=own_home)
    assert "\n" not in str(refused.value)
    log, line = re.findall(r"\((\S+/prefect\.log):(\d+)\)", str(refused.value))[0]
    assert re.search(r"ERROR .*schedule_(recent_)?deployments", Path(log).read_text().split("\n")[int(line) - 1])
    assert marked() == []
    assert not home.services_file().exists()


def test_unwritable_home_is_one_line(free_ports: Ports, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_home / "file").touch()
    monkeypatch.setenv("FEDLORA_HOME", str(own_home / "file" / "below"))
    with pytest.raises(ServiceError, match="FEDLORA_HOME"):
        up(*free_ports())


def test_down_spares_a_stranger_that_has_the_process_id(own_home: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as stranger:
        try:
            started = psutil.Process(stranger.pid).create_time()
            recorded = dict.fromkeys(("prefect", "mlflow", "worker"), (stranger.pid, started - 100))
            Services("http://127.0.0.1:1/api", "http://127.0.0.1:2", recorded).save()
            assert running_services() is None
            said: list[str] = []
            down(report=said.append)
            assert is_alive((stranger.pid, started))
            assert "nothing to stop" in said[0]
            assert not home.services_file().exists()
        finally:
            stranger.kill()


def test_a_process_that_ignores_sigterm_is_killed(own_home: Path) -> None:
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready'); time.sleep(60)"
    stubborn = processes.spawn("worker", [sys.executable, "-c", script], os.environ)
    assert eventually(lambda: "ready" in processes.log_file("worker").read_text())
    assert processes.stop({"worker": stubborn}, grace=0.3)
    assert not is_alive(stubborn)
    assert marked() == []


@pytest.mark.parametrize(
    "content", ["", "[]", '{"processes": 3}', '{"prefect_url": "", "mlflow_url": "", "processes": []}']
)
def test_a_damaged_record_is_no_record(own_home: Path, content: str) -> None:
    home.services_file().write_text(content)
    said: list[str] = []
    down(report=said.append)
    assert "nothing to stop" in said[0]


@pytest.mark.parametrize("limits", [{"cpu_runs": 0}, {"cpu_runs": -1}, {"gpu_runs": -1}])
def test_a_pool_without_room_is_refused(free_ports: Ports, own_home: Path, limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"runs at a time in .pu-workers: expected a whole number"):
        up(*free_ports(), **limits)  # type: ignore[arg-type]
    assert not home.services_file().exists()


@pytest.mark.parametrize(
    ("version", "visible", "expected"),
    [
        ("2.13.0", None, 2),
        ("2.13.0+cu129", None, 2),
        ("2.13.0+cpu", None, 0),
        ("2.13.0", "", 0),
        ("2.13.0", "1", 1),
        ("2.13.0", "0,-1,1", 1),
        ("2.13.0", "0,1,2", 2),
    ],
)
def test_gpus_are_counted_as_torch_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, visible: str | None, expected: int
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.setattr("importlib.metadata.version", lambda package: version)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch.gpus(tmp_path) == expected
