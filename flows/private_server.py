"""A Prefect server for one command, for those who have none running.

Prefect would start one by itself, but in the terminal's process group: Ctrl-C would kill it before the run's last state
could be recorded. This one is a session of its own, and ends when the process that started it ends, however that is.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora import home
from fedlora.errors import FedloraError
from flows import authentication, environment

_ANSWER_WITHIN_S = 120
_ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def available() -> Iterator[None]:
    """Within, there is a Prefect server: the one that is configured, or one of our own.

    Raises:
        FedloraError: it does not start; the end of its log is shown.
    """
    if _configured():
        yield
        return
    port = _free_port()
    process, log = _spawn(port)
    stopped = False
    try:
        yield from _with_server(process, port, log)
        log.unlink(missing_ok=True)  # of use only where something went wrong
    except KeyboardInterrupt:
        stopped = True
        raise
    finally:
        _end(process, wait=not stopped)


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


def _with_server(process: subprocess.Popen[bytes], port: int, log: Path) -> Iterator[None]:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = f"http://127.0.0.1:{port}/api"
    _wait(process, url, log)
    with temporary_settings({PREFECT_API_URL: url}):
        try:
            yield
        finally:
            _send_what_waits()


def _send_what_waits() -> None:
    """Logs and events are sent in the background; what still waits would find no server."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=5, at_exit=False)
    EventsWorker.drain_all(timeout=5, at_exit=False)


def _spawn(port: int) -> tuple[subprocess.Popen[bytes], Path]:
    log = home.logs() / f"prefect-private-{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    code = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from flows.private_server import serve; serve({port})"
    # A password for the servers of `fedlora up` is not for this one, whose only client would not know it.
    environ = environment.of_server() | authentication.without(os.environ, authentication.OF_SERVERS)
    environ |= {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1", "PREFECT_UI_ENABLED": "0"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
    return process, log


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    import httpx

    deadline = time.monotonic() + _ANSWER_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=2, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    lines = log.read_text(errors="replace").splitlines()[-5:]
    raise FedloraError(f"Prefect's server does not start (log: {log}): {' | '.join(lines) or 'no output'}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(port: int) -> None:
    """Run the server in this process until standard input closes."""
    import uvicorn

    config = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error"
    )
    server = uvicorn.Server(config)

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True

    threading.Thread(target=end_with_parent, daemon=True).start()
    server.run()
