"""Everything as shipped, for others too, so that the servers ask for passwords; with the real `prefect` command."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from standins import marked, set_home

from deployments.local import authentication
from deployments.local import registering as deploying
from deployments.local.environment import Services
from deployments.local.services import down, up
from deployments.local.standing import processes as status
from fedlora.config import configfile
from fedlora.files import home
from mlflow_tracking import store

pytestmark = pytest.mark.system

Ports = Callable[[], tuple[int, int]]


SECRET = "Kr0kodil"
PLANTED = {
    "PREFECT_SERVER_API_AUTH_STRING": f"ann:{SECRET}-of-prefect",
    "MLFLOW_AUTH_ADMIN_PASSWORD": f"{SECRET}-of-mlflow",
    "PGPASSWORD": f"{SECRET}-of-a-database",
    "HF_TOKEN": f"{SECRET}-of-the-hub",
    "FEDLORA_NOTIFY_URL": f"http://127.0.0.1:9/{SECRET}",
}
LOGINS = [PLANTED["PREFECT_SERVER_API_AUTH_STRING"], f"admin:{PLANTED['MLFLOW_AUTH_ADMIN_PASSWORD']}"]
OF_CLIENTS = {
    "PREFECT_API_AUTH_STRING": LOGINS[0],
    "MLFLOW_TRACKING_USERNAME": "admin",
    "MLFLOW_TRACKING_PASSWORD": PLANTED["MLFLOW_AUTH_ADMIN_PASSWORD"],
}


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What `up` and `down` have said."""
    return []


@pytest.fixture(scope="module")
def live(
    said: list[str],
    free_ports: Ports,
    with_databases: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Services]:
    """Everything as shipped, with a worker for GPUs that are not there, for others too: they ask for passwords."""
    with pytest.MonkeyPatch.context() as patch:
        set_home(patch, with_databases(tmp_path_factory.mktemp("home")), **PLANTED)
        try:
            found = up(*free_ports(), host="0.0.0.0", report=said.append, cpu_runs=3, gpu_runs=2)
            for name, value in OF_CLIENTS.items():
                patch.setenv(name, value)
            yield found
        finally:
            down(report=said.append)


def ask(method: str, url: str, **more: Any) -> httpx.Response:
    """As somebody who has the password of Prefect's server."""
    return httpx.request(method, url, headers=authentication.header(LOGINS[0]), timeout=30, **more)


def test_pools_have_limits_and_workers(live: Services) -> None:
    pools = ask("POST", f"{live.prefect_url}/work_pools/filter", json={}).raise_for_status().json()
    assert {pool["name"]: (pool["type"], pool["concurrency_limit"]) for pool in pools} == {
        "cpu-workers": ("process", 3),
        "gpu-workers": ("process", 2),
    }
    assert all(pool["base_job_template"]["variables"] for pool in pools)
    assert [each.name for each in status() if each.state == "running"] == ["prefect", "mlflow", "worker", "gpu-worker"]


def test_changing_one_value_changes_nothing_else(live: Services, tiny: dict[str, Any], tmp_path: Path) -> None:
    """Through the real command, side by side on a device that only one may hold."""
    preset = tmp_path / "tiny.yaml"
    changes = {"strategy": "svd", "lora.rank": 2, "partition.alpha": 0.7, "runner.exclusive": True}
    preset.write_text(yaml.safe_dump({**tiny, **changes}))
    command = [sys.executable, "-m", "prefect", "deployment", "run", "federated/custom", "--watch", "-p"]
    environ = {**os.environ, "PREFECT_API_URL": live.prefect_url}
    cases = {"plain": [], "changed": ["-p", "strategy=flora-na"]}
    running = {
        name: subprocess.Popen(
            [*command, f"preset={preset}", "-p", f"run_dir={json.dumps(str(tmp_path / name))}", *words],
            env=environ,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, words in cases.items()
    }
    for process in running.values():
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    plain, changed = (configfile.flatten(configfile.read_yaml(tmp_path / name / "config.yaml")) for name in cases)
    assert {key for key in plain.keys() | changed.keys() if plain.get(key) != changed.get(key)} == {"strategy"}
    assert (plain["strategy"], changed["strategy"]) == ("svd", "flora-na")
    assert (changed["lora.rank"], changed["partition.alpha"], changed["rounds"]) == (2, 0.7, tiny["rounds"])
    assert all((tmp_path / name / "adapter" / "adapter_model.safetensors").is_file() for name in cases)


def test_a_run_that_cannot_begin_fails_with_one_line_and_leaves_nothing(live: Services, tmp_path: Path) -> None:
    """As a person meets it who watches: the line, no traceback; no run folder, and no run in MLflow."""
    settings = {"data.label": "topic", "tracking.experiment": "refused"}
    words = ["-p", f"overrides={json.dumps(settings)}", "-p", f"run_dir={json.dumps(str(tmp_path / 'run'))}"]
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "run", "federated/custom", "--watch", *words],
        env={**os.environ, "PREFECT_API_URL": live.prefect_url, "COLUMNS": "500"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    line, cure = "has no column 'topic' for the label; its columns are: text, label.", "Set data.label to one of them"
    assert done.returncode == 1
    assert line in done.stdout
    assert "Traceback" not in done.stdout
    failed = {"flow_runs": {"state": {"type": {"any_": ["FAILED"]}}}}
    state = ask("POST", f"{live.prefect_url}/flow_runs/filter", json=failed).json()[0]["state"]
    assert (state["type"], "\n" in state["message"]) == ("FAILED", False)
    assert line in state["message"]
    assert state["message"].endswith(cure)
    assert not (tmp_path / "run").exists()
    assert "refused" not in [each.name for each in store.client(live.mlflow_url).search_experiments()]


def holding(folder: Path, *words: str) -> set[str]:
    """Files anywhere below a folder that hold one of the words."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name for path in files if any(word.encode() in path.read_bytes() for word in words)}


def test_servers_for_others_ask_for_passwords_and_these_are_written_nowhere(
    live: Services, said: list[str], tiny: dict[str, object]
) -> None:
    """Last of the tests with servers: when all that came before has left its traces."""
    client = {name: value for name, value in os.environ.items() if name not in authentication.OF_SERVERS}
    try:
        address = next(iter(authentication.addresses()), "127.0.0.1")  # as another machine calls them
        asked = ("/work_pools/filter", "/api/2.0/mlflow/experiments/search")
        for base, path, login in zip((live.prefect_url, live.mlflow_url), asked, LOGINS, strict=True):
            url = base.replace("127.0.0.1", address) + path
            assert httpx.post(url, json={}).status_code == 401
            assert httpx.post(url, json={}, auth=("ann", "a guess")).status_code == 401
            login_header = authentication.header(login)
            assert httpx.post(url, json={"max_results": 1}, headers=login_header).status_code == 200
        assert not any(SECRET in word for pid in marked() for word in psutil.Process(pid).cmdline())
        words = [f"{key}={json.dumps(value)}" for key, value in {**tiny, "rounds": 1, "name": "in-the-open"}.items()]
        fedlora = str(Path(sys.executable).with_name("fedlora"))
        command = [fedlora, "run", "demo", *words]
        done = subprocess.run(command, check=False, env=client, capture_output=True, text=True, cwd=deploying.SOURCE)
        assert done.returncode == 0, done.stderr
        looking = {name: value for name, value in client.items() if name not in authentication.OF_PREFECT}
        standing = [
            subprocess.run([fedlora, "status"], check=False, env=each, capture_output=True, text=True)
            for each in (client, looking)
        ]
    finally:
        down(report=said.append)
    assert marked() == []
    assert [each.returncode for each in standing] == [0, 1]
    assert [each.stdout.count(" running  ") for each in standing] == [4, 3]
    assert "cpu-workers  3 at a time" in standing[0].stdout
    assert "WANTS A PASSWORD" in standing[1].stdout
    encoded = [authentication.header(login)["Authorization"].partition(" ")[2] for login in LOGINS]
    assert SECRET not in f"{done.stdout}{done.stderr}{said}{standing}"
    assert holding(home.home(), SECRET, *encoded) == set()
    for database in (home.prefect_database(), home.mlflow_database()):
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert holding(home.home(), SECRET, *encoded) == set()
    assert {"config.yaml", "mlflow.db", "prefect.db"} <= holding(home.home(), "in-the-open")  # it would be found
