"""`fedlora up --database`: both servers on a real PostgreSQL server, and the password nowhere to be read."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import psutil
import pytest
import yaml

from deployments.local import database, server_log
from deployments.local.processes import log_file
from deployments.local.services import down, up
from deployments.local.standing import processes as status
from fedlora.errors import ConfigError, FedloraError
from fedlora.files import home
from mlflow_tracking import compare, store

Ports = Callable[[], tuple[int, int]]
STAND_IN = '''
import os
from prefect import flow


@flow
def stand_in() -> None:
    """A flow that looks for what it must not see."""
    assert "PGPASSWORD" not in os.environ
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


def password_of(url: str) -> str:
    return unquote(urlsplit(url).password or "")


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
    free_ports: Ports, own_home: Path, postgresql: str, tiny: dict[str, object]
) -> None:
    source = own_home / "source"
    (source / "flows").mkdir(parents=True)
    (source / "deployments").mkdir()
    (source / "flows" / "federated.py").write_text(STAND_IN)
    (source / "deployments" / "prefect.yaml").write_text(DECLARED)
    said: list[str] = []
    ports = free_ports()
    services = up(*ports, report=said.append, source=source, database=postgresql)
    secret = password_of(postgresql)
    try:
        assert any("created the databases fedlora_prefect and fedlora_mlflow" in line for line in said)
        experiment = {"name": "kept"}
        httpx.post(f"{services.mlflow_url}/api/2.0/mlflow/experiments/create", json=experiment).raise_for_status()
        for name, (pid, _) in services.processes.items():
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                assert secret not in " ".join(process.cmdline()), name
                visible = process.environ().get("PGPASSWORD")
                assert visible == (None if name == "worker" else secret), name
        with pytest.raises(ConfigError, match=r"already run on postgresql://fed%20lora@.*fedlora down"):
            up(*ports, report=said.append, source=source, database="postgresql://elsewhere:5433")
        deployment = httpx.get(f"{services.prefect_url}/deployments/name/stand-in/here").raise_for_status().json()
    finally:
        down(report=said.append)
    assert not home.prefect_database().exists()
    assert not home.mlflow_database().exists()

    again = up(*ports, report=said.append, source=source, database=postgresql)
    try:
        assert sum("created the database" in line for line in said) == 1
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
    for text in (secret, urlsplit(postgresql).password or ""):
        assert not any(text in line for line in said)
        assert not [path for path in written if text.encode() in path.read_bytes()]


def test_a_wrong_password_is_one_line_without_it(free_ports: Ports, own_home: Path, postgresql: str) -> None:
    wrong = postgresql.replace(urlsplit(postgresql).password or "", "Wr0ngOne")
    with pytest.raises(FedloraError, match=r"refuses.*password authentication failed.*PGPASSWORD") as refused:
        up(*free_ports(), database=wrong)
    assert "\n" not in str(refused.value)
    assert "Wr0ngOne" not in str(refused.value)
    assert not home.logs().exists()


def test_the_password_may_come_from_the_environment(
    own_home: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = urlsplit(postgresql)
    without = f"postgresql://{parts.username}@{parts.hostname}:{parts.port}"
    with pytest.raises(FedloraError, match=r"no password supplied.*PGPASSWORD"):
        database.prepare(database.choose(without))
    monkeypatch.setenv("PGPASSWORD", password_of(postgresql))
    database.prepare(database.choose(without))
    assert database.prepare(database.choose(without)) == []  # they are there now
    assert "PGPASSWORD" not in database.choose(without).prefect  # inherited, as the user set it


def test_each_server_may_have_a_url_of_its_own(
    own_home: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(database.PREFECT_URL, f"{postgresql}/own_prefect")
    monkeypatch.setenv(database.MLFLOW_URL, f"{postgresql}/own_mlflow?sslmode=prefer")
    chosen = database.choose(None)
    assert database.prepare(chosen) == ["own_prefect", "own_mlflow"]
    assert chosen.prefect[database.PREFECT_URL].startswith("postgresql+asyncpg://fed%20lora@127.0.0.1:")
    assert chosen.mlflow[database.MLFLOW_URL].startswith("postgresql+psycopg2://fed%20lora@127.0.0.1:")
    assert chosen.mlflow["PGSSLMODE"] == "prefer"
    assert chosen.mlflow["PGPASSWORD"] == password_of(postgresql)
    assert password_of(postgresql) not in repr(chosen)
    monkeypatch.setenv(database.MLFLOW_URL, f"{postgresql}/own_prefect")
    with pytest.raises(ConfigError, match="name the same database"):
        database.choose(None)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://me:Hush@here:1", "begins with 'mysql'; expected postgresql://USER@HOST:PORT"),
        ("here:5432", "begins with 'here'"),
        ("postgresql://me:Hush@here:many", "port is not a number"),
        ("postgresql://me:Hush@:5432", "names no host"),
        ("postgresql://me:Hush@here/mine", "'mine' names a database"),
        ("postgresql://me:Hush@here?application=x", "unknown setting 'application'"),
    ],
)
def test_an_address_that_cannot_be_read_is_one_line(free_ports: Ports, own_home: Path, url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        up(*free_ports(), database=url)
    assert "\n" not in str(refused.value)
    assert "Hush" not in str(refused.value)


def test_a_variable_with_an_unknown_scheme_is_one_line(
    free_ports: Ports, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(database.MLFLOW_URL, "nosuchstore://x")
    with pytest.raises(ConfigError, match=r"MLFLOW_BACKEND_STORE_URI begins with 'nosuchstore'"):
        up(*free_ports())


def test_a_server_that_does_not_answer_is_one_line(free_ports: Ports, own_home: Path) -> None:
    port = free_ports()[0]
    with pytest.raises(FedloraError, match=r"cannot be reached \(Connection refused\)") as refused:
        up(*free_ports(), database=f"postgresql://me:Hush@127.0.0.1:{port}")
    assert "\n" not in str(refused.value)
    assert "Hush" not in str(refused.value)


def test_a_missing_driver_names_the_extra(own_home: Path) -> None:
    code = """
        import sys
        sys.modules["psycopg2"] = None
        from deployments.local import database
        try:
            database.prepare(database.choose("postgresql://me@127.0.0.1"))
        except database.FedloraError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "pip install 'fedlora[postgresql]'" in done.stdout
    assert done.stdout.count("\n") == 1
