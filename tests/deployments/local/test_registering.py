"""What `fedlora up` registers from `deployments/prefect.yaml`, driven by the real `prefect` command."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deployments.form import AS_IN_PRESET
from deployments.local import environment, launch
from deployments.local import registering as deploying
from deployments.local.database import Databases
from deployments.local.environment import Services
from deployments.local.processes import ServiceError
from deployments.local.services import down, status, up
from fedlora.config import configfile
from fedlora.errors import TrackingError
from mlflow_tracking import store

Ports = Callable[[], tuple[int, int]]
OURS = ("PREFECT_", "MLFLOW_", "FEDLORA_")
NAMES = {
    "federated/custom",
    "federated/demo",
    "federated/gpu",
    "sweep/nightly",
    "sweep/weekly",
    "sweep/on-demand",
    "report/latest",
}


@pytest.fixture(scope="module")
def live(
    free_ports: Ports, with_databases: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Services]:
    """Everything as shipped, with a worker for GPUs that are not there."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(OURS)]:
            patch.delenv(name)
        patch.setenv("FEDLORA_HOME", str(with_databases(tmp_path_factory.mktemp("home"))))
        try:
            yield up(*free_ports(), report=lambda line: None, cpu_runs=3, gpu_runs=2)
        finally:
            down(report=lambda line: None)


def read(live: Services, name: str) -> dict[str, Any]:
    found: dict[str, Any] = (
        httpx.get(f"{live.prefect_url}/deployments/name/{name}", timeout=30).raise_for_status().json()
    )
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
    pools = httpx.post(f"{live.prefect_url}/work_pools/filter", json={}, timeout=30).raise_for_status().json()
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


def test_a_paused_schedule_stays_paused(live: Services, send: Callable[[str, str, dict[str, Any]], Any]) -> None:
    nightly = read(live, "sweep/nightly")
    schedule = nightly["schedules"][0]
    url = f"{live.prefect_url}/deployments/{nightly['id']}/schedules/{schedule['id']}"
    send("PATCH", url, {"active": False})
    deploying.deploy(live.prefect_url)
    again = read(live, "sweep/nightly")
    assert again["id"] == nightly["id"]
    assert [(each["id"], each["active"]) for each in again["schedules"]] == [(schedule["id"], False)]
    automations = httpx.post(f"{live.prefect_url}/automations/filter", json={}, timeout=30).raise_for_status().json()
    assert [each["name"] for each in automations] == ["fedlora: a run without heartbeat has crashed"]


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
    answer = httpx.post(url, json={"parameters": parameters}, timeout=30)
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
    found = httpx.post(f"{live.prefect_url}/flow_runs/filter", json=failed, timeout=30)
    state = found.json()[0]["state"]
    assert (state["type"], "\n" in state["message"]) == ("FAILED", False)
    assert line in state["message"]
    assert state["message"].endswith(cure)
    assert not (tmp_path / "run").exists()
    experiments = httpx.get(f"{live.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=50", timeout=30).json()
    assert "refused" not in [each["name"] for each in experiments.get("experiments", [])]


def test_an_experiment_that_was_deleted_on_the_server_is_known_before_a_run(live: Services) -> None:
    api = f"{live.mlflow_url}/api/2.0/mlflow/experiments"
    made = httpx.post(f"{api}/create", json={"name": "a & b"}, timeout=30).json()["experiment_id"]
    store.check_experiment(live.mlflow_url, "a & b")
    store.check_experiment(live.mlflow_url, "never seen")
    httpx.post(f"{api}/delete", json={"experiment_id": made}, timeout=30).raise_for_status()
    with pytest.raises(TrackingError, match=f"'a & b' was deleted; restore it .*-x {made}"):
        store.check_experiment(live.mlflow_url, "a & b")


def test_only_the_gpu_worker_sees_gpus() -> None:
    environ = launch.environments(Services("http://127.0.0.1:1/api", "http://127.0.0.1:2", {}), Databases({}, {}))
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


def test_the_record_keeps_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path))
    services = Services("http://127.0.0.1:1/api", "http://127.0.0.1:2", {"prefect": (1, 2.0)}, "postgresql://me@h:1")
    services.save()
    assert environment.recorded_services() == services
