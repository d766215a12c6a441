"""A real Prefect server for the session, a real SQLite MLflow store, flows run on them, and a real PostgreSQL."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import pytest

from deployments.local import environment, private_server
from fedlora_cli import app as cli


@pytest.fixture(scope="session")
def prefect_server(with_databases, tmp_path_factory):
    """Prefect with a database of its own; without heartbeats, whose end costs a second per flow."""
    from prefect import context, settings

    folder = with_databases(tmp_path_factory.mktemp("prefect"), "prefect.db")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # for the server, and for nobody else
            patch.setenv("FEDLORA_HOME", str(folder))
            for name, value in environment.defaults().items():
                patch.setenv(name, value)
            stack.enter_context(private_server.available())
        stack.enter_context(settings.temporary_settings({settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}))
        stack.enter_context(context._temporary_global_settings_context(context.get_settings_context()))  # for threads
        yield


@pytest.fixture(scope="session")
def store_uri(with_databases, tmp_path_factory):
    """An MLflow store in a SQLite file."""
    from mlflow_tracking import store

    uri = f"sqlite:///{with_databases(tmp_path_factory.mktemp('mlflow'), 'mlflow.db') / 'mlflow.db'}"
    store.experiment_id(store.client(uri), uri, "tests")
    return uri


@pytest.fixture(scope="session")
def run_flow(prefect_server, store_uri, tiny, tmp_path_factory):
    """`run_flow({"strategy": "svd"}, run_dir=…)`: a tiny run through the flow; returns its `RunFolder`."""
    from fedlora.run.runfolder import RunFolder
    from flows.federated import federated

    def run(changes=None, run_dir=None, **parameters):
        overrides = {**tiny, "tracking.uri": store_uri, "tracking.experiment": "tests", **(changes or {})}
        folder = run_dir or tmp_path_factory.mktemp("flow") / "run"
        return RunFolder(federated(preset="demo", overrides=overrides, run_dir=str(folder), **parameters))

    return run


@pytest.fixture(scope="session")
def finished_flow(run_flow):
    """The run that most tests look at: FedIT, two rounds. Not to be written to."""
    return run_flow({"strategy": "fedit", "tracking.adapter_every": 1})


@pytest.fixture(scope="session")
def postgresql():
    """The address, without databases of ours, of a PostgreSQL server that asks for a password.

    Debian's binaries: apt-get install postgresql. They refuse to run as root, which then becomes `nobody`.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    programs = found[-1].parent if found else Path(shutil.which("initdb") or "/missing").parent
    if not (programs / "initdb").exists():
        missing = "no PostgreSQL server on this machine: apt-get install postgresql"
        assert not os.environ.get("FULL_TESTS"), missing  # where everything is tested: make test-system
        pytest.skip(missing)
    account = pwd.getpwnam("nobody")
    become = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="fedlora-postgresql-"))
    password, secret = "p@ss:w/rd", folder / "password"
    secret.write_text(password)
    if become:
        for path in (folder, secret):
            os.chown(path, account.pw_uid, account.pw_gid)

    def call(program, *words):
        done = subprocess.run(
            [str(programs / program), *words],
            check=False,
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=120,
            **become,
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        data = ["-D", str(folder / "data")]
        call(
            "initdb", *data, "-U", "fed lora", "-A", "scram-sha-256", "--pwfile", str(secret), "--no-sync", "-E", "UTF8"
        )
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        call("pg_ctl", *data, "-w", "-o", options, "-l", str(folder / "log"), "start")
        yield f"postgresql://fed%20lora:p%40ss%3Aw%2Frd@127.0.0.1:{port}"
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            call("pg_ctl", *data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def new_database(postgresql):
    """`new_database(name)`: the address, with password, of a new database there."""

    def create(name: str) -> str:
        import psycopg2

        place = urlsplit(postgresql)
        login = {"user": unquote(place.username), "password": unquote(place.password)}
        connection = psycopg2.connect(host=place.hostname, port=place.port, dbname="postgres", **login)
        connection.autocommit = True  # CREATE DATABASE does not run in a transaction
        connection.cursor().execute(f"create database {name}")
        connection.close()
        return f"{postgresql}/{name}"

    return create


@pytest.fixture(scope="session")
def labelled():
    """`labelled(path, label="a")`: a csv of 60 texts in two classes, with columns replaced or (None) dropped."""

    import pandas as pd

    def write(path: Path, rows: int = 60, **columns) -> Path:
        table = pd.DataFrame({"text": [f"text number {i}" for i in range(rows)], "label": ["a", "b"] * (rows // 2)})
        for name, value in columns.items():
            table = table.drop(columns=name) if value is None else table.assign(**{name: value})
        table.to_csv(path, index=False)
        return path

    return write


@pytest.fixture
def fedlora(monkeypatch, capsys):
    """`fedlora("run", …)`: call the command line in this process; its exit code, output and errors."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["fedlora", *map(str, words)])
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        signal.signal(signal.SIGTERM, before)
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.fixture
def small(tiny, store_uri):
    """The tiny run as words of the command line."""
    settings = {**tiny, "tracking.uri": store_uri, "tracking.experiment": "cli"}
    return [f"{key}={'null' if value is None else value}" for key, value in settings.items()]


@pytest.fixture(scope="session")
def send():
    """`send("POST", url, {…})`: the answer, as JSON. A Prefect server whose SQLite file is busy says 503, and is asked
    again, as Prefect's own clients do."""

    def until_answered(method, url, body):
        for _ in range(60):
            answer = httpx.request(method, url, json=body, timeout=30)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(0.5)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    return until_answered


@pytest.fixture(scope="session")
def free_ports():
    """`free_ports()`: two ports of the loopback interface on which nobody listens."""

    def two() -> tuple[int, int]:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            return first.getsockname()[1], second.getsockname()[1]

    return two
