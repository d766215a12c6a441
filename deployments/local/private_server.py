"""A Prefect server for one command, for those who have none running.

Its imports take seconds, so that they may begin (`begin_imports`) while the command still looks at what it was given: a
process that has only imported has opened no file and no port, and ends as soon as the command does.

Prefect would start one by itself, but in the terminal's process group: Ctrl-C would kill it before the run's last state
could be recorded. This one is a session of its own, and ends when the process that started it ends, however that is.
"""

from __future__ import annotations

import gc
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deployments.local import authentication, environment
from fedlora.errors import FedloraError
from fedlora.files import home
from fedlora.training import forerunner

_ANSWER_WITHIN_S = 120
_ROOT = Path(__file__).resolve().parents[2]


_ahead: Server | None = None
"""The process whose imports have begun."""


@dataclass(frozen=True)
class Server:
    """A server's process: it imports, and serves when it is told where."""

    process: subprocess.Popen[bytes]
    early: IO[bytes]
    """What it says before it has a log."""


def begin_imports() -> None:
    """Let the processes that a run here will need import in the background, while this one looks at the configuration.

    They have opened nothing, and end when this process does. A server's only where it is likely that one will be
    needed. Needs no heavy import itself.
    """
    forerunner.begin()
    _begin_server()


def _begin_server() -> None:
    global _ahead
    named = os.environ.get("PREFECT_API_URL") or os.environ.get("PREFECT_PROFILE")
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH") or Path.home() / ".prefect" / "profiles.toml")
    new = not (home.home() / "prefect").is_dir()  # which importing Prefect would make
    if _ahead is None and not (named or profiles.is_file() or new):
        _ahead = _spawn()


@contextmanager
def available() -> Iterator[None]:
    """Within, there is a Prefect server: the one that is configured, or one of our own.

    Raises:
        FedloraError: it does not start; the end of its log is shown.
    """
    global _ahead
    server, _ahead = _ahead, None
    if _configured():
        if server:
            _end(server.process, wait=False)
        yield
        return
    from prefect.settings import PREFECT_API_URL, temporary_settings

    server = server or _spawn()
    log = home.logs() / f"prefect-private-{os.getpid()}.log"
    stopped = False
    try:
        with temporary_settings({PREFECT_API_URL: _let_serve(server, log)}):
            try:
                yield
            finally:
                _send_what_waits()
        log.unlink(missing_ok=True)  # of use only where something went wrong
    except KeyboardInterrupt:
        stopped = True
        raise
    finally:
        _end(server.process, wait=not stopped)


def _let_serve(server: Server, log: Path) -> str:
    """Tell the process where to serve, and where its log is; the address of its API, when it answers there."""
    from deployments.local import asking, waiting

    process, port = server.process, _free_port()
    url = f"http://127.0.0.1:{port}/api"
    log.parent.mkdir(parents=True, exist_ok=True)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has died already: its log says why
        process.stdin.write(f"{port} {log}\n".encode())
        process.stdin.flush()
    deadline = time.monotonic() + _ANSWER_WITHIN_S
    waiting.until(lambda: process.poll() is not None or asking.answers(url), deadline, every=0.05)
    if process.poll() is None and asking.answers(url):
        return url
    with log.open("ab") as file:
        server.early.seek(0)
        file.write(server.early.read())
    lines = log.read_text("utf-8", errors="replace").splitlines()[-5:]
    raise FedloraError(f"Prefect's server does not start (log: {log}): {' | '.join(lines) or 'no output'}")


def _end(process: subprocess.Popen[bytes], wait: bool) -> None:
    """Let the server end, which it does when its input closes; a person who has stopped the run is not kept waiting."""
    if process.stdin:
        process.stdin.close()
    if not wait:
        return
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _configured() -> bool:
    from prefect.settings import get_current_settings

    return bool(get_current_settings().api.url)


def _send_what_waits() -> None:
    """Logs and events are sent in the background; what still waits would find no server."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=5, at_exit=False)
    EventsWorker.drain_all(timeout=5, at_exit=False)


def _spawn() -> Server:
    code = (
        f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from deployments.local.private_server import serve; serve()"
    )
    # A password for the servers of `fedlora up` is not for this one, whose only client would not know it.
    environ = environment.of_server() | authentication.without(os.environ, authentication.OF_SERVERS)
    environ |= environment.UTF8
    environ |= {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"}
    early = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=early,
        stderr=subprocess.STDOUT,
        env=environ,
        start_new_session=True,
    )
    return Server(process, early)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve() -> None:
    """Import, then serve at the port and with the log that standard input names, until it closes."""
    told: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(told,), daemon=True).start()
    gc.disable()  # imports make nothing but what stays
    import prefect.server.api.server
    import uvicorn

    gc.freeze()
    gc.enable()
    port, _, log = told.get().decode().strip().partition(" ")
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    app = prefect.server.api.server.create_app()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=int(port), log_level="error"))

    def end_with_parent() -> None:
        told.get()
        server.should_exit = True

    threading.Thread(target=end_with_parent, daemon=True).start()
    server.run()
    gc.freeze()  # as `fedlora_cli.app.main`


def _listen(told: queue.SimpleQueue[bytes]) -> None:
    """Pass on the one line that the parent writes; its end too, before which there is no server that could end.

    Without a buffer of Python's, whose lock this thread would hold when the process ends for another reason.
    """
    line = b""
    while not line.endswith(b"\n"):
        more = os.read(0, 4096)
        if not more:
            os._exit(0)
        line += more
    told.put(line)
    while os.read(0, 4096):
        pass
    told.put(b"")
