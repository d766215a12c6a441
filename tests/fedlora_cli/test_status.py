"""`fedlora status`: what it finds without servers, with foreign ones, and how it says it."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from deployments.local import standing
from deployments.local.environment import Services
from deployments.local.processes import log_file
from deployments.local.server_log import Failure
from deployments.local.standing import Next, Pool, Server, Standing
from fedlora_cli import status as cli_status

NOW = datetime(2026, 11, 27, 19, 30, tzinfo=UTC)
Fedlora = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_", "FEDLORA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path))
    # What the command fills in is undone with the rest.
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "PREFECT_API_AUTH_STRING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def strict_server() -> Iterator[str]:
    """A Prefect server as far as its address goes, which answers its health check and wants a password for the rest."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200)

        def do_POST(self) -> None:
            allowed = self.headers.get("Authorization", "") == "Basic bWU6c2VjcmV0"
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(200 if allowed else 401)

        def _answer(self, code: int) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps([]).encode())

        def log_message(self, *words: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    server.server_close()


def test_nothing_runs(fedlora: Fedlora, own_home: Path) -> None:
    code, out, err = fedlora("status")
    assert (code, err) == (1, "")
    assert out.splitlines()[0].startswith("nothing runs")
    assert str(own_home) in out
    assert "fedlora up" in out


def test_processes_that_died_are_told_with_their_last_words(own_home: Path) -> None:
    dead = dict.fromkeys(("prefect", "mlflow", "worker"), (psutil.Process().pid, 1.0))  # a stranger has the number now
    Services("http://127.0.0.1:1/api", "http://127.0.0.1:2", dead).save()
    log_file("worker").parent.mkdir()
    log_file("worker").write_text("begun\nout of memory\n")
    found = standing.look()
    assert [each.state for each in found.servers] == ["stopped"] * 3
    told = "\n".join(cli_status.lines(found, NOW))
    assert "NOTHING RUNS" in told
    assert "last line: out of memory" in told
    assert str(log_file("worker")) in told
    assert not found.well


def test_a_server_of_somebody_else_is_asked_with_the_password_of_the_environment(
    strict_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", strict_server)
    found = standing.look()
    assert [(each.state, each.remark) for each in found.servers] == [("wants a password", "PREFECT_API_URL names it")]
    assert "WANTS A PASSWORD" in "\n".join(cli_status.lines(found, NOW))
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "me:secret")
    found = standing.look()
    assert [each.state for each in found.servers] == ["running"]
    assert (found.pools, found.schedules, found.trouble) == ([], [], "")


def test_a_server_that_is_not_there(fedlora: Fedlora, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, out, _ = fedlora("status")
    assert code == 1
    assert out.count("DOES NOT ANSWER") == 2


def test_what_is_wrong_is_loud_and_lines_fit(tmp_path: Path) -> None:
    log = tmp_path / "prefect.log"
    found = Standing(
        [
            Server("Prefect", "running", "http://127.0.0.1:4200"),
            Server("worker", "stopped", "pool cpu-workers", "x" * 99),
        ],
        [
            Pool("cpu-workers", 2, False, [], 0, 3),
            Pool("gpu-workers", 1, True, ["one"], 0, 1),
            Pool("mine", None, False, ["one", "two" * 40], 2, 0),
        ],
        [Next("sweep/nightly", NOW + timedelta(hours=6, minutes=30)), Next("sweep/weekly", None)],
        failed=[Failure("schedule_deployments", "2026-11-27 19:29:00", "E: " + "why " * 40, 7, 3)],
        log=log,
    )
    told = cli_status.lines(found, NOW)
    assert all(len(line) <= 100 or str(tmp_path) in line for line in told)
    text = "\n".join(told)
    assert "NO WORKER: its runs wait for ever" in text
    assert "PAUSED: its runs wait for ever" in text
    assert "(in 6 h 30 min)  sweep/nightly" in text
    assert "NOT PLANNED" in text
    assert "schedule_deployments, 3 times (line 7)" in text
    assert not found.well
    fine = Standing([Server("Prefect", "running", "http://127.0.0.1:4200")], [], [Next("sweep/nightly", NOW)])
    assert fine.well


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "0 s"), (40, "40 s"), (119, "119 s"), (720, "12 min"), (3600, "1 h 0 min"), (86400 * 3, "3 days")],
)
def test_distances(seconds: float, said: str) -> None:
    assert f"(in {said})" in "\n".join(
        cli_status.lines(
            Standing([Server("Prefect", "running", "")], [], [Next("a/b", NOW + timedelta(seconds=seconds))]), NOW
        )
    )
