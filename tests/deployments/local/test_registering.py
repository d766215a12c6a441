"""What `fedlora up` registers from `deployments/prefect.yaml`, driven by the real `prefect` command; and that servers
for others ask who is calling."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
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

from deployments.form import AS_IN_PRESET
from deployments.local import authentication, environment, launch
from deployments.local import registering as deploying
from deployments.local.environment import Services
from deployments.local.processes import ServiceError
from deployments.local.services import down, up
from deployments.local.standing import processes as status
from fedlora.config import configfile
from fedlora.errors import TrackingError
from fedlora.files import home
from mlflow_tracking import store

Ports = Callable[[], tuple[int, int]]
NAMES = {
    "federated/custom",
    "federated/demo",
    "federated/gpu",
    "sweep/nightly",
    "sweep/weekly",
    "sweep/on-demand",
    "report/latest",
}


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


def read(live: Services, name: str) -> dict[str, Any]:
    found: dict[str, Any] = ask("GET", f"{live.prefect_url}/deployments/name/{name}").raise_for_status().json()
    return found


def schema(live: Services, name: str) -> dict[str, Any]:
    properties: dict[str, Any] = read(live, name)["parameter_openapi_schema"]["properties"]
    return properties


def test_the_file_is_what_is_registered(live: Services) -> None:
    flows = {each["entrypoint"]: each for each in deploying.declared()}
    assert len(flows) == 3
    found = {name: read(live, name) for name in NAMES}
    assert len(deploying.declared()) == len(found)
    assert all(each["description"] for each in found.values())
    pools = {name: each["work_pool_name"] for name, each in found.items()}
    assert pools.pop("federated/gpu") == "gpu-workers"
    assert set(pools.values()) == {"cpu-workers"}
    assert found["federated/gpu"]["parameter_openapi_schema"] == found["federated/custom"]["parameter_openapi_schema"]
    assert found["sweep/nightly"]["parameters"] == {"sweep": "demo-seeds", "fresh": True}
    weekly = {each["slug"]: each["parameters"]["overrides"] for each in found["sweep/weekly"]["schedules"]}
    assert weekly == {"saturday-uneven": {"partition.alpha": 0.1}, "sunday-even": {"partition.alpha": 100}}
    for name in ("sweep/nightly", "sweep/weekly"):
        assert found[name]["global_concurrency_limit"]["limit"] == 1
        assert {each["schedule"]["timezone"] for each in found[name]["schedules"]} == {"UTC"}


def test_pools_have_limits_and_workers(live: Services) -> None:
    pools = ask("POST", f"{live.prefect_url}/work_pools/filter", json={}).raise_for_status().json()
    assert {pool["name"]: (pool["type"], pool["concurrency_limit"]) for pool in pools} == {
        "cpu-workers": ("process", 3),
        "gpu-workers": ("process", 2),
    }
    assert all(pool["base_job_template"]["variables"] for pool in pools)
    assert [each.name for each in status() if each.state == "running"] == ["prefect", "mlflow", "worker", "gpu-worker"]


def test_the_form_has_drop_downs_and_help(live: Services) -> None:
    form = schema(live, "federated/custom")
    assert form["strategy"]["enum"][0] == form["strategy"]["default"] == AS_IN_PRESET
    assert {"flora-na", "fedit", "svd"} < set(form["strategy"]["enum"])
    assert "anyOf" not in form["strategy"]  # Prefect would draw tabs, with the choices behind one of them
    assert form["preset"]["anyOf"][0]["enum"] == ["demo", "standard"]
    assert schema(live, "sweep/on-demand")["sweep"]["anyOf"][0]["enum"][:2] == ["demo", "demo-seeds"]
    for name in ("federated/custom", "sweep/on-demand", "report/latest"):
        assert all(field["description"] for field in schema(live, name).values()), name


def test_a_paused_schedule_stays_paused(live: Services) -> None:
    nightly = read(live, "sweep/nightly")
    schedule = nightly["schedules"][0]
    url = f"{live.prefect_url}/deployments/{nightly['id']}/schedules/{schedule['id']}"
    ask("PATCH", url, json={"active": False}).raise_for_status()
    deploying.deploy(live.prefect_url)
    again = read(live, "sweep/nightly")
    assert again["id"] == nightly["id"]
    assert [(each["id"], each["active"]) for each in again["schedules"]] == [(schedule["id"], False)]
    automations = ask("POST", f"{live.prefect_url}/automations/filter", json={}).raise_for_status().json()
    assert len(automations) == len({each["name"] for each in automations}) == 2  # nor are there any twice


@pytest.mark.system
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


@pytest.mark.parametrize(
    ("deployment", "parameters"),
    [
        ("federated/custom", {"strategy": "flora-nah"}),
        ("federated/custom", {"preset": "deom"}),
        ("sweep/on-demand", {"sweep": "demoo"}),
    ],
)
def test_a_name_that_is_not_in_the_list_is_refused(live: Services, deployment: str, parameters: dict[str, str]) -> None:
    url = f"{live.prefect_url}/deployments/{read(live, deployment)['id']}/create_flow_run"
    answer = ask("POST", url, json={"parameters": parameters})
    assert answer.status_code == 409
    assert next(iter(parameters.values())) in answer.text


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


def test_an_experiment_that_was_deleted_on_the_server_is_known_before_a_run(live: Services) -> None:
    client = store.client(live.mlflow_url)
    made = client.create_experiment("a & b")
    store.check_experiment(live.mlflow_url, "a & b")
    store.check_experiment(live.mlflow_url, "never seen")
    client.delete_experiment(made)
    with pytest.raises(TrackingError, match=f"'a & b' was deleted; restore it .*-x {made}"):
        store.check_experiment(live.mlflow_url, "a & b")


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


def test_only_the_gpu_worker_sees_gpus() -> None:
    environ = launch.environments(Services("http://127.0.0.1:1/api", "http://127.0.0.1:2", {}))
    assert environ["worker"]["CUDA_VISIBLE_DEVICES"] == ""
    assert environ["gpu-worker"].get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")
    assert environ["worker"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("deployments: [", "cannot be read: line 2, column 1"),
        ("deployments:\n- {name: x}", "expected a list `deployments`"),
        ("- a", "expected a list `deployments`"),
        ("deployments: []", "declares no deployment"),
        ("deployments: []\nname: x\ndeployments: []", "'deployments' is there twice, on lines 1 and 3"),
    ],
)
def test_a_file_that_declares_nothing_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "deployments").mkdir()
    (tmp_path / "deployments" / "prefect.yaml").write_text(text)
    with pytest.raises(ServiceError, match=said) as refused:
        deploying.check_source(tmp_path)
    assert "\n" not in str(refused.value)


FEDERATED = "- {name: mine, entrypoint: flows/federated.py:federated, parameters: %s}"
SWEEP = "- {name: mine, entrypoint: flows/sweep.py:run_sweep, parameters: {sweep: demo}, schedules: [{parameters: %s}]}"
MISTAKES = {
    "preset": (FEDERATED, "{preset: deom}", "unknown preset 'deom'. Did you mean 'demo'?"),
    "file": (FEDERATED, "{preset: /no/such.yaml}", "no such file: /no/such.yaml"),
    "key": (FEDERATED, "{overrides: {lora.rnak: 4}}", "unknown key 'lora.rnak'. Did you mean 'lora.rank'?"),
    "value": (FEDERATED, "{overrides: {lora.rank: 0}}", "lora.rank=0 is not allowed"),
    "parameter": (FEDERATED, "{fraction: 2}", "fraction=2 is not allowed"),
    "sweep": (SWEEP, "{sweep: demoo}", "unknown sweep 'demoo'. Did you mean 'demo'?"),
    "key of a schedule": (SWEEP, "{overrides: {sede: 4}}", "unknown key 'sede'. Did you mean 'seed'?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_parameters_that_no_run_can_have_are_one_line_before_anything_starts(tmp_path: Path, mistake: str) -> None:
    declared, parameters, said = MISTAKES[mistake]
    for folder in ("presets", "sweeps"):
        shutil.copytree(deploying.SOURCE / "deployments" / folder, tmp_path / "deployments" / folder)
    file = tmp_path / "deployments" / "prefect.yaml"
    file.write_text(f"deployments:\n{declared % parameters}\n")
    with pytest.raises(ServiceError, match=re.escape(f"{file}: deployment 'mine': {said}")) as refused:
        deploying.check_source(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_record_of_an_earlier_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path))
    services = Services("http://127.0.0.1:1/api", "http://127.0.0.1:2", {"prefect": (1, 2.0)})
    home.services_file().write_text(json.dumps({**dataclasses.asdict(services), "database": "postgresql://me@h:1"}))
    assert environment.recorded_services() == services
