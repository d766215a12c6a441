"""`fedlora up` and `down` with real servers on free loopback ports, in a home of their own."""

from __future__ import annotations

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from deployments.local import authentication, gpus, processes
from deployments.local import registering as deploying
from deployments.local.environment import Services, is_alive, recorded_services, running_services
from deployments.local.prefect_api import CPU_POOL
from deployments.local.processes import ServiceError
from deployments.local.registering import deploy
from deployments.local.services import TITLES, down, status, up
from fedlora.errors import ConfigError, FedloraError
from fedlora.files import home

Ports = Callable[[], tuple[int, int]]
STAND_IN = '''
import os
from pathlib import Path
from prefect import flow


@flow
def federated(word: str = "done") -> None:
    """Leave a trace of where and how it ran."""
    text = "\\n".join([word, os.getcwd(), os.environ["MLFLOW_TRACKING_URI"]])
    Path(os.environ["FEDLORA_HOME"], "trace").write_text(text)
'''
DECLARED = """
build:
- prefect.deployments.steps.run_shell_script: {id: source, script: pwd, stream_output: false}
pull:
- prefect.deployments.steps.set_working_directory: {directory: "{{ source.stdout }}"}
deployments:
- {name: custom, entrypoint: "flows/federated.py:federated", work_pool: {name: cpu-workers}}
"""
OURS = ("PREFECT_", "MLFLOW_", "FEDLORA_")


@dataclass
class Live:
    """The servers that most tests share."""

    services: Services
    source: Path
    said: list[str]


def descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def marked() -> list[int]:
    """Whatever runs anywhere on this machine for the home in use, children of children included."""
    marks = {processes._mark(name) for name in TITLES}
    return [process.pid for process in psutil.process_iter() if processes._marked(process, marks)]


def write_flow(source: Path, text: str = STAND_IN, declared: str = DECLARED) -> None:
    (source / "flows").mkdir()
    (source / "flows" / "federated.py").write_text(text)
    (source / "deployments").mkdir()
    (source / "deployments" / "prefect.yaml").write_text(declared)


def eventually(condition: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def set_home(patch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in [name for name in os.environ if name.startswith(OURS)]:
        patch.delenv(name)
    patch.setenv("FEDLORA_HOME", str(folder))


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    set_home(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def live(free_ports: Ports, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    source = tmp_path_factory.mktemp("source")
    write_flow(source)
    with pytest.MonkeyPatch.context() as patch:
        set_home(patch, tmp_path_factory.mktemp("a home"))  # with a space, as on some desktops
        said: list[str] = []
        services = up(*free_ports(), report=said.append, source=source)
        try:
            yield Live(services, source, said)
        finally:
            down(report=said.append)


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
    kept = ("prefect", "worker")
    assert {name: services.processes[name] for name in kept} == {name: live.services.processes[name] for name in kept}
    assert services.mlflow_url == live.services.mlflow_url
    assert httpx.get(f"{services.mlflow_url}/health").is_success
    assert not any(orphan.is_running() for orphan in orphans)


def test_deploying_a_broken_flow_says_why(live: Live, tmp_path: Path) -> None:
    write_flow(tmp_path, f"import a_module_that_is_missing\n{STAND_IN}")
    with pytest.raises(ServiceError, match=r"(?s)cannot register.*a_module_that_is_missing"):
        deploy(live.services.prefect_url, tmp_path)


def test_down_stops_all_and_keeps_the_databases(live: Live) -> None:
    """Last of the tests on the servers that ask for no password."""
    assert marked()
    said: list[str] = []
    down(report=said.append)
    assert "stopped" in said[0]
    assert str(home.home()) in said[0]
    assert marked() == []
    assert not home.services_file().exists()
    assert status() == []
    assert home.prefect_database().exists()
    assert home.mlflow_database().exists()
    down(report=said.append)
    assert "nothing to stop" in said[1]


SECRET = "Kr0kodil"
PLANTED = {
    "PREFECT_SERVER_API_AUTH_STRING": f"ann:{SECRET}-of-prefect",
    "MLFLOW_AUTH_ADMIN_PASSWORD": f"{SECRET}-of-mlflow",
    "PGPASSWORD": f"{SECRET}-of-a-database",
    "HF_TOKEN": f"{SECRET}-of-the-hub",
    "FEDLORA_NOTIFY_URL": f"http://127.0.0.1:9/{SECRET}",
}
LOGINS = [PLANTED["PREFECT_SERVER_API_AUTH_STRING"], f"admin:{PLANTED['MLFLOW_AUTH_ADMIN_PASSWORD']}"]


def holding(folder: Path, *words: str) -> set[str]:
    """Files anywhere below a folder that hold one of the words."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name for path in files if any(word.encode() in path.read_bytes() for word in words)}


def test_servers_for_others_ask_for_passwords_and_these_are_written_nowhere(
    free_ports: Ports, live: Live, monkeypatch: pytest.MonkeyPatch, tiny: dict[str, object]
) -> None:
    """On the databases that the tests before have left, whose making takes longer than all of this."""
    down(report=live.said.append)
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    client = {name: value for name, value in os.environ.items() if name not in authentication.OF_SERVERS}
    client |= {"PREFECT_API_AUTH_STRING": LOGINS[0], "MLFLOW_TRACKING_USERNAME": "admin"}
    client["MLFLOW_TRACKING_PASSWORD"] = PLANTED["MLFLOW_AUTH_ADMIN_PASSWORD"]
    said: list[str] = []
    try:
        services = up(*free_ports(), host="0.0.0.0", report=said.append, source=live.source)
        address = next(iter(authentication.addresses()), "127.0.0.1")  # as another machine calls them
        asked = ("/work_pools/filter", "/api/2.0/mlflow/experiments/search")
        for base, path, login in zip((services.prefect_url, services.mlflow_url), asked, LOGINS, strict=True):
            url = base.replace("127.0.0.1", address) + path
            assert httpx.post(url, json={}).status_code == 401
            assert httpx.post(url, json={}, auth=("ann", "a guess")).status_code == 401
            login_header = authentication.header(login)
            assert httpx.post(url, json={"max_results": 1}, headers=login_header).status_code == 200
        assert not any(SECRET in word for pid in marked() for word in psutil.Process(pid).cmdline())
        words = [f"{key}={json.dumps(value)}" for key, value in {**tiny, "rounds": 1, "name": "in-the-open"}.items()]
        command = [sys.executable, "-m", "fedlora_cli", "run", "demo", *words]
        done = subprocess.run(command, check=False, env=client, capture_output=True, text=True, cwd=deploying.SOURCE)
        assert done.returncode == 0, done.stderr
        looking = {name: value for name, value in client.items() if name not in authentication.OF_PREFECT}
        standing = [
            subprocess.run([*command[:3], "status"], check=False, env=each, capture_output=True, text=True)
            for each in (client, looking)
        ]
    finally:
        down(report=said.append)
    assert [each.returncode for each in standing] == [0, 1]
    assert [each.stdout.count(" running  ") for each in standing] == [3, 2]
    assert "cpu-workers  2 at a time" in standing[0].stdout
    assert "WANTS A PASSWORD" in standing[1].stdout
    encoded = [authentication.header(login)["Authorization"].partition(" ")[2] for login in LOGINS]
    assert SECRET not in f"{done.stdout}{done.stderr}{said}{standing}"
    assert holding(home.home(), SECRET, *encoded) == set()
    for database in (home.prefect_database(), home.mlflow_database()):
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert holding(home.home(), SECRET, *encoded) == set()
    assert {"config.yaml", "mlflow.db", "prefect.db"} <= holding(home.home(), "in-the-open")  # it would be found


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
    write_flow(own_home)
    (own_home / "flows" / "federated.py").unlink()
    with pytest.raises(ServiceError, match=r"flows/federated.py.* does not exist"):
        up(*free_ports(), source=own_home)
    assert not home.logs().exists()
    assert not home.services_file().exists()


def test_a_server_that_dies_takes_the_others_with_it(
    free_ports: Ports, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_flow(own_home)
    monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", "sqlite:////proc/nowhere/mlflow.db")
    with pytest.raises(FedloraError, match=r"(?s)MLflow server stopped while starting.*/proc/nowhere"):
        up(*free_ports(), report=lambda line: None, source=own_home)
    assert marked() == []
    assert not home.services_file().exists()


def test_a_server_that_plans_nothing_is_stopped_and_the_service_and_its_line_are_named(
    free_ports: Ports, own_home: Path, with_databases: Callable[[Path], Path]
) -> None:
    """Its database refuses what the scheduler writes; everything else of it works."""
    write_flow(own_home, declared=f'{DECLARED.rstrip()[:-1]}, schedules: [{{cron: "0 2 * * *"}}]}}')
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
    assert gpus.count(tmp_path) == expected
