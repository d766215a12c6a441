"""What a real Prefect server does by itself: give up a run whose process was killed, tell how a sweep ended."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from fedlora import home
from flows import automations, environment
from flows.environment import Services
from flows.services import down, up

STAND_IN = '''
import time
from prefect import flow


@flow
def federated() -> None:
    """A run that takes its time."""
    time.sleep(300)
'''
DECLARED = """
build:
- prefect.deployments.steps.run_shell_script: {id: source, script: pwd, stream_output: false}
pull:
- prefect.deployments.steps.set_working_directory: {directory: "{{ source.stdout }}"}
deployments:
- {name: custom, entrypoint: "flows/federated.py:federated", work_pool: {name: cpu-workers}}
"""
SECRET = "/hooks/s3cret-t0ken"


class Listener:
    """A web server that keeps what is posted to it."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, dict[str, str]]] = []
        heard = self.heard

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                heard.append((self.path, json.loads(body)))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *words: object) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}{SECRET}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


Send = Callable[[str, str, dict[str, Any]], Any]


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    listening = Listener()
    yield listening
    listening.server.shutdown()
    listening.server.server_close()


@pytest.fixture(scope="module")
def live(
    listener: Listener,
    free_ports: Callable[[], tuple[int, int]],
    with_databases: Callable[[Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Services, list[str]]]:
    source = tmp_path_factory.mktemp("source")
    for name, text in {"flows/federated.py": STAND_IN, "deployments/prefect.yaml": DECLARED}.items():
        (source / name).parent.mkdir()
        (source / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_", "FEDLORA_"))]:
            patch.delenv(name)
        patch.setenv("FEDLORA_HOME", str(with_databases(tmp_path_factory.mktemp("home"))))
        patch.setenv(automations.NOTIFY_URL, listener.url)
        said: list[str] = []
        services = up(*free_ports(), report=said.append, source=source)
        try:
            with temporary_settings({PREFECT_API_URL: services.prefect_url}):
                yield services, said
        finally:
            down(report=said.append)


def eventually(condition: Callable[[], bool], seconds: float = 90) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def test_a_busy_run_may_skip_heartbeats() -> None:
    every = int(environment.defaults()["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert timedelta(seconds=3 * every) <= automations.SILENT_FOR


def test_where_nobody_wants_to_know_nobody_is_told(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """First: afterwards another server is the one that is asked."""
    monkeypatch.delenv(automations.NOTIFY_URL, raising=False)
    assert list(automations.apply()) == [automations.crashed_without_heartbeat().name]


def test_a_second_time_changes_nothing_and_switched_off_stays_off(live: tuple[Services, list[str]], send: Send) -> None:
    services, _ = live
    names = {each["name"]: each for each in send("POST", f"{services.prefect_url}/automations/filter", {})}
    assert len(names) == 2  # `up` made them
    assert set(automations.apply().values()) == {"unchanged"}
    crash = automations.crashed_without_heartbeat().name
    page = f"{services.prefect_url}/automations/{names[crash]['id']}"
    send("PATCH", page, {"enabled": False})
    assert automations.apply(timedelta(seconds=10))[crash] == "updated"
    after = {each["name"]: each for each in send("POST", f"{services.prefect_url}/automations/filter", {})}
    assert {name: each["id"] for name, each in after.items()} == {name: each["id"] for name, each in names.items()}
    assert not after[crash]["enabled"]
    send("PATCH", page, {"enabled": True})


def test_a_sweep_that_fails_is_told_and_the_address_stays_secret(
    live: tuple[Services, list[str]], listener: Listener
) -> None:
    services, said = live

    @flow(name="sweep", flow_run_name='sweep "quoted"')
    def sweep() -> None:
        raise ValueError("no cell finished")

    @flow(name="federated")
    def other() -> None:
        return

    other()
    with pytest.raises(ValueError, match="no cell finished"):
        sweep()
    assert eventually(lambda: bool(listener.heard))
    path, told = listener.heard[0]
    assert path == SECRET
    assert told["state"] == "Failed"
    assert told["flow_run"] == 'sweep "quoted"'
    assert told["url"].startswith(services.prefect_url.removesuffix("/api"))
    assert told["text"].startswith("sweep 'sweep \"quoted\"' ended: Failed. http")
    assert len(listener.heard) == 1  # a single run is nobody's business
    assert not any(SECRET in line for line in said)
    files = [path for path in home.home().rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    for _, (pid, _) in services.processes.items():
        assert automations.NOTIFY_URL not in psutil.Process(pid).environ()


def test_a_run_whose_process_and_worker_are_killed_becomes_crashed(
    live: tuple[Services, list[str]], send: Send
) -> None:
    """Last: nobody works here afterwards."""
    services, _ = live
    automations.apply(timedelta(seconds=10))
    deployment = httpx.get(f"{services.prefect_url}/deployments/name/federated/custom", timeout=30).json()
    run = send("POST", f"{services.prefect_url}/deployments/{deployment['id']}/create_flow_run", {})
    heartbeat = {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}}}
    resource = f"prefect.flow-run.{run['id']}"

    def has_sent_one() -> bool:
        events = send("POST", f"{services.prefect_url}/events/filter", heartbeat)["events"]
        return any(each["resource"]["prefect.resource.id"] == resource for each in events)

    assert eventually(has_sent_one)
    worker = psutil.Process(services.processes["worker"][0])
    for process in [worker, *worker.children(recursive=True)]:
        process.kill()

    def state() -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{services.prefect_url}/flow_runs/{run['id']}", timeout=30).json()["state"]
        return found

    assert eventually(lambda: state()["type"] == "CRASHED"), state()
    assert "no heartbeat for 10 s" in state()["message"]
