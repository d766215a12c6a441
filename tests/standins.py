"""Servers of `fedlora up` with flows that stand in for ours, for the tests that look at them one after the other."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from deployments.local import processes
from deployments.local.environment import Services
from deployments.local.services import TITLES

FLOWS = '''
import os
import time
from pathlib import Path
from prefect import flow, task


@task
def train() -> None:
    """What a run consists of."""


@flow
def federated(word: str = "") -> None:
    """Leave a trace of where and how it ran; without a word, take its time."""
    if not word:
        time.sleep(300)
    text = "\\n".join([word, os.getcwd(), os.environ["MLFLOW_TRACKING_URI"]])
    Path(os.environ["FEDLORA_HOME"], "trace").write_text(text)


@flow
def tick() -> None:
    """One that does nothing."""
    train()
'''
ONE = """
build:
- prefect.deployments.steps.run_shell_script: {id: source, script: pwd, stream_output: false}
pull:
- prefect.deployments.steps.set_working_directory: {directory: "{{ source.stdout }}"}
deployments:
- {name: custom, entrypoint: "flows/federated.py:federated", work_pool: {name: cpu-workers}}
"""
SEVERAL = f"""{ONE}
- name: nightly
  entrypoint: flows/federated.py:federated
  work_pool: {{name: cpu-workers}}
  schedules: [{{slug: every-night, cron: "0 2 * * *", timezone: UTC}}]
- name: soon
  entrypoint: flows/federated.py:tick
  work_pool: {{name: cpu-workers}}
  schedules: [{{slug: soon, interval: 5, active: false}}]
- {{name: unserved, entrypoint: "flows/federated.py:tick", work_pool: {{name: gpu-workers}}}}
"""
OFTEN = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "4",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ORPHAN_CLEANUP_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs,orphans",
    "PREFECT_WORKER_HEARTBEAT_SECONDS": "2",
}
"""Services of the server that are due every second or two."""
HOOK = "/hooks/s3cret-t0ken"
OURS = ("PREFECT_", "MLFLOW_", "FEDLORA_")


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
        self.url = f"http://127.0.0.1:{self.server.server_port}{HOOK}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@dataclass
class Live:
    """The servers that tests share."""

    services: Services
    source: Path
    folder: Path
    """Their home."""
    said: list[str]
    listener: Listener
    environ: dict[str, str]
    """What they were started with."""
    planned: list[dict[str, Any]]
    """Runs of the deployment `nightly` when `up` returned."""


def descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def marked() -> list[int]:
    """Whatever runs anywhere on this machine for the home in use, children of children included."""
    marks = {processes._mark(name) for name in TITLES}
    return [process.pid for process in psutil.process_iter() if processes._marked(process, marks)]


def write_flows(source: Path, text: str = FLOWS, declared: str = ONE) -> None:
    for name, content in {"flows/federated.py": text, "deployments/prefect.yaml": declared}.items():
        (source / name).parent.mkdir()
        (source / name).write_text(content)


def eventually(condition: Callable[[], bool], seconds: float = 90) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def set_home(patch: pytest.MonkeyPatch, folder: Path, **more: str) -> None:
    """Let there be no variable of ours or of the servers' but these."""
    for name in [name for name in os.environ if name.startswith(OURS)]:
        patch.delenv(name)
    for name, value in {"FEDLORA_HOME": str(folder), **more}.items():
        patch.setenv(name, value)
