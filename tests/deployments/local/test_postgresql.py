"""`fedlora up` on databases of one's own: both servers on a real PostgreSQL, and the password nowhere to be read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import httpx
import psutil
import pytest
import yaml

from deployments.local import launch, server_log
from deployments.local.environment import Services
from deployments.local.processes import log_file
from deployments.local.services import down, up
from deployments.local.standing import processes as status
from fedlora.errors import ConfigError
from fedlora.files import home
from mlflow_tracking import compare, store

Ports = Callable[[], tuple[int, int]]
PREFECT, MLFLOW = "PREFECT_SERVER_DATABASE_CONNECTION_URL", "MLFLOW_BACKEND_STORE_URI"
ALL = (PREFECT, "PREFECT_API_DATABASE_CONNECTION_URL", MLFLOW, "PGPASSWORD")
STAND_IN = '''
from prefect import flow


@flow
def stand_in() -> None:
    """A flow to be planned."""
'''
DECLARED = """
build:
- prefect.deployments.steps.run_shell_script: {id: source, script: pwd, stream_output: false}
pull:
- prefect.deployments.steps.set_working_directory: {directory: "{{ source.stdout }}"}
deployments:
- name: here
  entrypoint: flows/federated.py:stand_in
  work_pool: {name: cpu-workers}
  schedules: [{cron: "0 2 * * *"}] # `up` returns when the scheduler has planned runs on PostgreSQL too
"""


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_", "FEDLORA_", "PG"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    return tmp_path


def four_runs_side_by_side(folder: Path, mlflow_url: str, tiny: dict[str, object]) -> None:
    """A sweep of four runs at once on the servers of `up`: every run finishes, and no point of any round is lost."""
    file = folder / "four.yaml"
    grid = {"strategy": ["fedit", "svd"], "seed": [0, 1]}
    file.write_text(yaml.safe_dump({"name": "four", "set": tiny, "grid": grid}))
    fedlora = str(Path(sys.executable).with_name("fedlora"))
    done = subprocess.run(
        [fedlora, "sweep", str(file), "--parallel", "4"], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "locked" not in done.stdout + done.stderr
    runs = compare.load("demo", sweep="four", uri=mlflow_url)
    assert list(runs["status"]) == ["FINISHED"] * 4
    client = store.client(mlflow_url)
    for run in runs["run_id"]:
        points = client.get_metric_history(run, "global/accuracy")
        assert [point.step for point in points] == [0, 1, 2]


@pytest.mark.system
def test_both_servers_keep_their_state_and_the_password_is_nowhere(
    free_ports: Ports,
    own_home: Path,
    new_database: Callable[[str], str],
    tiny: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = own_home / "source"
    (source / "flows").mkdir(parents=True)
    (source / "deployments").mkdir()
    (source / "flows" / "federated.py").write_text(STAND_IN)
    (source / "deployments" / "prefect.yaml").write_text(DECLARED)
    variables = {
        PREFECT: new_database("up_prefect").replace("postgresql", "postgresql+asyncpg", 1),
        MLFLOW: new_database("up_mlflow"),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    ports, secret = free_ports(), urlsplit(variables[MLFLOW]).password or ""
    secrets = (secret, unquote(secret))
    services = up(*ports, report=said.append, source=source)
    try:
        experiment = {"name": "kept"}
        httpx.post(f"{services.mlflow_url}/api/2.0/mlflow/experiments/create", json=experiment).raise_for_status()
        for name, (pid, _) in services.processes.items():
            own = {"prefect": PREFECT, "mlflow": MLFLOW}.get(name)
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                assert not any(secret in " ".join(process.cmdline()) for secret in secrets), name
                environ = process.environ()
                assert {each for each in variables if environ.get(each) == variables[each]} == {own} - {None}, name
        deployment = httpx.get(f"{services.prefect_url}/deployments/name/stand-in/here").raise_for_status().json()
    finally:
        down(report=said.append)
    assert not home.prefect_database().exists()
    assert not home.mlflow_database().exists()

    again = up(*ports, report=said.append, source=source)
    try:
        assert [service.state for service in status()] == ["running"] * 3
        found = httpx.get(f"{again.prefect_url}/deployments/name/stand-in/here").raise_for_status().json()
        assert found["id"] == deployment["id"]
        query = {"experiment_name": "kept"}
        httpx.get(f"{again.mlflow_url}/api/2.0/mlflow/experiments/get-by-name", params=query).raise_for_status()
        four_runs_side_by_side(own_home, again.mlflow_url, tiny)
        assert server_log.failures(log_file("prefect")) == []
    finally:
        down(report=said.append)
    written = [path for path in home.home().rglob("*") if path.is_file() and path.stat().st_size < 5e6]
    assert any(path.name == "prefect.log" for path in written)
    for text in secrets:
        assert not any(text in line for line in said)
        assert not [path for path in written if text.encode() in path.read_bytes()]


@pytest.mark.parametrize("prefect", [PREFECT, "PREFECT_API_DATABASE_CONNECTION_URL"])
def test_each_variable_reaches_its_own_server_and_no_worker(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, prefect: str
) -> None:
    given = {prefect: "postgresql+asyncpg://here:1/own", MLFLOW: "mysql://me:Hush@here/own", "PGPASSWORD": "Hush"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    environ = launch.environments(Services("http://127.0.0.1:1/api", "http://127.0.0.1:2", {}))
    found = {name: {key: value for key, value in each.items() if key in ALL} for name, each in environ.items()}
    assert found["prefect"] == {PREFECT: given[prefect], "PGPASSWORD": "Hush"}
    assert found["mlflow"] == {MLFLOW: given[MLFLOW], "PGPASSWORD": "Hush"}
    assert found["worker"] == found["gpu-worker"] == {}


@pytest.mark.parametrize(
    ("mlflow", "said"),
    [
        ("postgresql+psycopg2://me:Hush@here:5432/both", "name the same database"),
        ("postgresql://me:Hush@here:many/own", "MLFLOW_BACKEND_STORE_URI is no address of a database"),
        ("Hush", "MLFLOW_BACKEND_STORE_URI is no address of a database"),
        ("nosuchstore://me:Hush@here/own", "MLFLOW_BACKEND_STORE_URI is no address of a database"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_made(
    free_ports: Ports, own_home: Path, monkeypatch: pytest.MonkeyPatch, mlflow: str, said: str
) -> None:
    monkeypatch.setenv(PREFECT, "postgresql+asyncpg://you:Hush@here/both")
    monkeypatch.setenv(MLFLOW, mlflow)
    with pytest.raises(ConfigError, match=said) as refused:
        up(*free_ports())
    assert "\n" not in str(refused.value)
    assert "Hush" not in str(refused.value)
    assert not home.logs().exists()


def test_the_option_that_was_says_what_to_do_now(fedlora: Callable[..., Any]) -> None:
    code, _, err = fedlora("up", "--database", "postgresql://me:Hush@here")
    assert code == ConfigError.exit_code
    assert "compose.yaml" in err
    assert "MLFLOW_BACKEND_STORE_URI" in err
    assert "Hush" not in err
    assert err.count("\n") == 1
