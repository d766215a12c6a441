"""Servers that others reach ask who is calling, or do not start; what the environment must hold, and who gets it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments.local import asking, authentication, environment, launch, ports
from deployments.local import registering as deploying
from deployments.local.asking import verify
from deployments.local.environment import Services
from deployments.local.processes import ServiceError
from deployments.local.services import up
from fedlora.errors import ConfigError, FedloraError, TrackingError
from fedlora.files import home
from mlflow_tracking import store

Ports = Callable[[], tuple[int, int]]
PREFECT, MLFLOW = "ann:a-prefect-S3CRET", "an-mlflow-S3CRET"
GOOD = {"PREFECT_SERVER_API_AUTH_STRING": PREFECT, "MLFLOW_AUTH_ADMIN_PASSWORD": MLFLOW}


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_", "FEDLORA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path))  # no credentials of MLflow's


def given(monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
    for name, value in {**GOOD, **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)


def services(host: str = "0.0.0.0", authenticated: bool = True) -> Services:
    return Services("http://127.0.0.1:4200/api", "http://127.0.0.1:5000", {}, host, authenticated)


@pytest.mark.parametrize("asked", [{"host": "0.0.0.0"}, {"authenticate": True}])
def test_without_passwords_nothing_starts_and_every_variable_is_named(free_ports: Ports, asked: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        up(*free_ports(), **asked)
    text = str(refused.value)
    assert "PREFECT_SERVER_API_AUTH_STRING is not set: expected USER:PASSWORD" in text
    assert "MLFLOW_AUTH_ADMIN_PASSWORD is not set: expected 12 characters" in text
    assert "\n" not in text
    assert not home.home().exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"PREFECT_SERVER_API_AUTH_STRING": "S3CRET-without-user"}, "PREFECT_SERVER_API_AUTH_STRING is not USER:"),
        ({"PREFECT_SERVER_API_AUTH_STRING": "admin:S3CRET"}, "a password of 12 characters or more"),
        ({"PREFECT_API_AUTH_STRING": "ann:another-S3CRET"}, "PREFECT_API_AUTH_STRING is not the same as"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": "S3CRET"}, "MLFLOW_AUTH_ADMIN_PASSWORD is too short"),
        ({"MLFLOW_AUTH_ADMIN_PASSWORD": "password1234"}, "too short or published"),
        ({"MLFLOW_TRACKING_PASSWORD": "a-client's-S3CRET"}, "only one of MLFLOW_TRACKING_USERNAME and"),
        ({"MLFLOW_AUTH_CONFIG_PATH": "/nowhere.ini"}, "/nowhere.ini, which is no file"),
    ],
)
def test_unusable_passwords_are_refused_and_not_shown(
    free_ports: Ports, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], complaint: str
) -> None:
    given(monkeypatch, **changes)
    with pytest.raises(ConfigError, match=complaint) as refused:
        up(*free_ports(), host="0.0.0.0")
    assert "S3CRET" not in str(refused.value)
    assert "password1234" not in str(refused.value)


def test_an_ini_file_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "auth.ini"
    file.write_text(f"[mlflow]\nadmin_username = root\nadmin_password = 100%{MLFLOW}\n")
    file.chmod(0o644)
    given(monkeypatch, MLFLOW_AUTH_CONFIG_PATH=str(file), MLFLOW_AUTH_ADMIN_PASSWORD=None)
    monkeypatch.delenv("MLFLOW_AUTH_ADMIN_PASSWORD", raising=False)
    with pytest.raises(ConfigError, match="others can read: chmod 600"):
        authentication.check("0.0.0.0")
    file.chmod(0o600)
    authentication.check("0.0.0.0")
    assert authentication.mlflow_login() == ("root", f"100%{MLFLOW}")


@pytest.mark.parametrize(
    ("host", "complaint"),
    [
        ("::", "IPv6 is not supported"),
        ("[::1]", "IPv6 is not supported"),
        ("example.org", "is no address"),
        ("", "is no address"),
        ("192.0.2.254", "is no address of this machine, which has"),
        ("224.0.0.1", "is no address of this machine"),
    ],
)
def test_other_hosts_are_refused(free_ports: Ports, monkeypatch: pytest.MonkeyPatch, host: str, complaint: str) -> None:
    given(monkeypatch)
    with pytest.raises(ConfigError, match=rf"{complaint}.*expected 127\.0\.0\.1") as refused:
        up(*free_ports(), host=host)
    assert "\n" not in str(refused.value)
    assert not home.home().exists()


def test_loopback_needs_nothing_and_stays_the_default() -> None:
    assert ports.address("localhost") == ports.LOOPBACK == "127.0.0.1"
    assert ports.is_loopback("127.0.0.1")
    assert not ports.is_loopback("0.0.0.0")
    started = launch.commands(services("127.0.0.1", authenticated=False))
    assert "--app-name" not in started["mlflow"]
    assert started["prefect"][-4:] == ["--host", "127.0.0.1", "--port", "4200"]


def test_each_process_gets_its_own_secrets_and_none_is_among_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, HF_TOKEN="an-hf-S3CRET", FEDLORA_NOTIFY_URL="https://host/S3CRET")
    started = launch.commands(services())
    assert "S3CRET" not in str(started)
    assert started["mlflow"][-2:] == ["--app-name", "basic-auth"]
    environ = launch.environments(services())
    holding = {name: {key for key, value in env.items() if "S3CRET" in value} for name, env in environ.items()}
    assert holding["prefect"] == {"PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING"}
    assert holding["mlflow"] == {"MLFLOW_AUTH_ADMIN_PASSWORD"}
    assert holding["worker"] == {"PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"}
    assert environ["worker"]["MLFLOW_TRACKING_USERNAME"] == "admin"
    assert len(environ["mlflow"]["MLFLOW_FLASK_SERVER_SECRET_KEY"]) == 64


def test_only_names_of_ours_are_answered_to(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, MLFLOW_SERVER_ALLOWED_HOSTS="mlflow.example.org, *.example.org")
    monkeypatch.setattr(authentication, "addresses", lambda: ["192.0.2.7"])
    environ = authentication.mlflow_server("0.0.0.0", 5000)
    hosts, origins = environ["MLFLOW_SERVER_ALLOWED_HOSTS"], environ["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"]
    assert {"127.0.0.1:5000", "192.0.2.7:5000", "mlflow.example.org"} <= set(hosts.split(","))
    assert {"http://192.0.2.7:5000", "https://mlflow.example.org"} <= set(origins.split(","))
    assert "*" not in origins


def test_files_are_for_this_user_only_and_hold_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch)
    authentication.prepare_files()
    for path in (home.mlflow_auth_file(), home.mlflow_auth_database()):
        assert path.stat().st_mode & 0o077 == 0
        assert "S3CRET" not in path.read_text()
    assert f"sqlite:///{home.mlflow_auth_database()}" in home.mlflow_auth_file().read_text()


def test_passwords_of_our_servers_go_to_our_servers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch)
    process = (os.getpid(), __import__("psutil").Process().create_time())
    home.home().mkdir()
    Services("http://127.0.0.1:1/api", "http://127.0.0.1:2", {"prefect": process, "mlflow": process}).save()
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    environment.prepare()
    assert "PREFECT_API_AUTH_STRING" not in os.environ
    assert "MLFLOW_TRACKING_PASSWORD" not in os.environ
    monkeypatch.delenv("PREFECT_API_URL")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for name in ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that they are forgotten after this test
        del os.environ[name]
    environment.prepare()
    assert os.environ["PREFECT_API_AUTH_STRING"] == PREFECT
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("admin", MLFLOW)


def test_servers_that_run_without_passwords_are_not_mixed_with_others(
    free_ports: Ports, monkeypatch: pytest.MonkeyPatch
) -> None:
    given(monkeypatch)
    process = (os.getpid(), __import__("psutil").Process().create_time())
    home.home().mkdir()
    record = Services("http://127.0.0.1:1/api", "http://127.0.0.1:2", {"prefect": process})
    record.save()
    for asked in ({"host": "0.0.0.0"}, {"authenticate": True}):
        with pytest.raises(ConfigError, match=r"already run on 127\.0\.0\.1 and ask for no password"):
            up(*free_ports(), **asked)  # type: ignore[arg-type]
    Services("http://127.0.0.1:1/api", "http://127.0.0.1:2", {"prefect": process}, "0.0.0.0", True).save()
    monkeypatch.delenv("MLFLOW_AUTH_ADMIN_PASSWORD")
    with pytest.raises(ConfigError, match="MLFLOW_AUTH_ADMIN_PASSWORD is not set"):  # what died is not replaced bare
        up(*free_ports())
    home.services_file().unlink()


class Door(BaseHTTPRequestHandler):
    """A server that may or may not ask who is calling."""

    code_for_strangers, accepted = 401, ""

    def do_GET(self) -> None:
        known = self.headers.get("Authorization", "") == self.accepted != ""
        self.send_response(200 if known or "/health" in self.path else self.code_for_strangers)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words: Any) -> None:
        """Not to the terminal."""


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Door, "code_for_strangers", 401)
    monkeypatch.setattr(Door, "accepted", "")
    with HTTPServer(("127.0.0.1", 0), Door) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_lets_strangers_in_does_not_stay(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch)
    monkeypatch.setattr(Door, "code_for_strangers", 200)
    with pytest.raises(ServiceError, match=r"the Prefect server answers 200 .* without a password, expected 401"):
        verify(Services(f"{door}/api", door, {}))


def test_passwords_that_a_server_does_not_take_are_told(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch)
    with pytest.raises(ServiceError, match=r"the Prefect server answers 401 .* set PREFECT_API_AUTH_STRING"):
        verify(Services(f"{door}/api", door, {}))
    monkeypatch.setattr(Door, "accepted", authentication.header(PREFECT)["Authorization"])
    with pytest.raises(ServiceError, match=r"the MLflow server answers 401 .*mlflow-auth\.db") as refused:
        verify(Services(f"{door}/api", door, {}))
    assert "S3CRET" not in str(refused.value)


def test_a_client_without_password_is_told_what_to_set(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"{door}/api")
    with pytest.raises(FedloraError, match="wants a user and password; set PREFECT_API_AUTH_STRING"):
        asking.check_prefect()
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "ann:wrong")
    with pytest.raises(FedloraError, match="wants another user and password"):
        asking.check_prefect()
    monkeypatch.setattr(Door, "accepted", authentication.header("ann:wrong")["Authorization"])
    asking.check_prefect()
    with pytest.raises(TrackingError, match="wants a user and password; set MLFLOW_TRACKING_USERNAME"):
        store.check(door)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    store.check(door)


def test_registering_gets_the_password_but_not_the_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given(monkeypatch)
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:3128")
    monkeypatch.setenv("NO_PROXY", "intranet.example.org")
    seen: dict[str, str] = {}
    monkeypatch.setattr("subprocess.Popen", lambda command, env, **other: seen.update(env))
    deploying.begin("http://192.0.2.7:4200/api", tmp_path)
    assert {name for name, value in seen.items() if "S3CRET" in value} == {"PREFECT_API_AUTH_STRING"}
    assert {"192.0.2.7", "127.0.0.1", "intranet.example.org"} <= set(seen["NO_PROXY"].split(","))
