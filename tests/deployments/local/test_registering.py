"""What `fedlora up` registers from `deployments/prefect.yaml`, driven by the real `prefect` command."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.form import AS_IN_PRESET
from deployments.local import environment, launch
from deployments.local import registering as deploying
from deployments.local.environment import Services
from deployments.local.processes import ServiceError
from deployments.shipped import PRESETS, SWEEPS
from fedlora.config import configfile
from fedlora.files import home

Send = Callable[[str, str, dict[str, Any]], Any]
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
def server(prefect_server: None) -> str:
    """The address of a Prefect server with which everything is registered as shipped."""
    from prefect.settings import PREFECT_API_URL

    url = str(PREFECT_API_URL.value())
    deploying.deploy(url)
    return url


def read(server: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server}/deployments/name/{name}", timeout=30).raise_for_status().json()
    return found


def schema(server: str, name: str) -> dict[str, Any]:
    properties: dict[str, Any] = read(server, name)["parameter_openapi_schema"]["properties"]
    return properties


def test_the_file_is_what_is_registered(server: str) -> None:
    flows = {each["entrypoint"]: each for each in deploying.declared()}
    assert len(flows) == 3
    found = {name: read(server, name) for name in NAMES}
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


def test_the_form_has_drop_downs_and_help(server: str) -> None:
    form = schema(server, "federated/custom")
    assert form["strategy"]["enum"][0] == form["strategy"]["default"] == AS_IN_PRESET
    assert {"flora-na", "fedit", "svd"} < set(form["strategy"]["enum"])
    assert "anyOf" not in form["strategy"]  # Prefect would draw tabs, with the choices behind one of them
    assert form["preset"]["anyOf"][0]["enum"] == configfile.preset_names(PRESETS)
    assert schema(server, "sweep/on-demand")["sweep"]["anyOf"][0]["enum"] == configfile.preset_names(SWEEPS)
    for name in ("federated/custom", "sweep/on-demand", "report/latest"):
        assert all(field["description"] for field in schema(server, name).values()), name


def test_a_paused_schedule_stays_paused(server: str, send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    """When everything is registered again: in this process, which has imported the flows."""
    nightly = read(server, "sweep/nightly")
    schedule = nightly["schedules"][0]
    url = f"{server}/deployments/{nightly['id']}/schedules/{schedule['id']}"
    send("PATCH", url, {"active": False})
    monkeypatch.chdir(deploying.SOURCE)  # and back, as Prefect's words on the command line
    monkeypatch.setattr(sys, "argv", [])
    deploying.register(deploying.SOURCE)
    again = read(server, "sweep/nightly")
    assert again["id"] == nightly["id"]
    assert [(each["id"], each["active"]) for each in again["schedules"]] == [(schedule["id"], False)]
    automations = send("POST", f"{server}/automations/filter", {})
    assert len(automations) == len({each["name"] for each in automations}) >= 1  # nor are there any twice


@pytest.mark.parametrize(
    ("deployment", "parameters"),
    [
        ("federated/custom", {"strategy": "flora-nah"}),
        ("federated/custom", {"preset": "deom"}),
        ("sweep/on-demand", {"sweep": "demoo"}),
    ],
)
def test_a_name_that_is_not_in_the_list_is_refused(server: str, deployment: str, parameters: dict[str, str]) -> None:
    url = f"{server}/deployments/{read(server, deployment)['id']}/create_flow_run"
    answer = httpx.post(url, json={"parameters": parameters}, timeout=30)
    assert answer.status_code == 409
    assert next(iter(parameters.values())) in answer.text


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
