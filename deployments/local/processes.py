"""Long-running processes: started apart from the terminal, stopped with everything they started, never mistaken.

Each runs in a session (and process group) of its own and carries `FEDLORA_SERVICE=<name> of <home>` in its environment,
which its children inherit: so a child that outlives its parent, and still holds a port, is found and stopped too.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from deployments.local.environment import Process, is_alive
from fedlora.errors import FedloraError
from fedlora.files import home

MARK = "FEDLORA_SERVICE"

_own: list[subprocess.Popen[bytes]] = []  # kept, because Python warns about a Popen that is dropped while it runs


class ServiceError(FedloraError):
    """A server or worker did not start, does not answer, or cannot be stopped."""


def log_file(name: str) -> Path:
    """Where the process called `name` writes; the log of the one before it lies beside it as `.log.1`."""
    return home.logs() / f"{name}.log"


def spawn(name: str, command: Sequence[str], environ: Mapping[str, str]) -> Process:
    """Start `command` in the background, in a session of its own, with its output in `log_file(name)`.

    Raises:
        ServiceError: the log cannot be written, or the program cannot be started.
    """
    log = log_file(name)
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,  # nothing may ask a question
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environ, MARK: _mark(name), "PYTHONUNBUFFERED": "1"},
                cwd=home.home(),  # not the user's: Prefect reads .env, prefect.toml and pyproject.toml there
                start_new_session=True,
            )
    except OSError as error:
        place = error.filename or log
        raise ServiceError(
            f"cannot start the {name} process: {place}: {error.strerror or error}. "
            "FEDLORA_HOME chooses another folder for databases and logs."
        ) from error
    _own.append(process)
    return process.pid, psutil.Process(process.pid).create_time()


def ending(log: Path | str, count: int = 12) -> str:
    """The last lines of a log file or a text, indented, without the carets under a traceback's code."""
    try:
        text = log.read_text("utf-8", errors="replace") if isinstance(log, Path) else log
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.strip(" ^~")][-count:]
    return "\n".join(f"    {line}" for line in lines) or "    (the log is empty)"


def stop(processes: Mapping[str, Process], grace: float = 10.0) -> bool:
    """Ask these processes and all they started to end (SIGTERM), and kill what is left after `grace` seconds.

    A process whose start time differs from the recorded one is a stranger and is left alone.

    Returns:
        Whether there was anything to stop.

    Raises:
        ServiceError: something could not be stopped, e.g. it belongs to another user.
    """
    members = _members(processes)
    _signal(members, signal.SIGTERM)
    _, left = psutil.wait_procs(members, timeout=grace)
    for _ in range(3):  # again, for what was being started while we looked
        if not (stubborn := {*left, *_members(processes)}):
            return bool(members)
        _signal(stubborn, signal.SIGKILL)
        _, left = psutil.wait_procs(stubborn, timeout=2)
    if left:
        names = ", ".join(str(process.pid) for process in left)
        raise ServiceError(f"could not stop process {names}: it does not end even when killed. Try again later.")
    return True


def stop_children(parent: Process, grace: float = 10.0) -> None:
    """Stop what `parent` has started and leave it running, so that it can report how they ended."""
    if not is_alive(parent):
        return
    children = psutil.Process(parent[0]).children(recursive=True)
    _signal(children, signal.SIGTERM)
    _, stubborn = psutil.wait_procs(children, timeout=grace)
    _signal(stubborn, signal.SIGKILL)
    if children:
        psutil.wait_procs(stubborn, timeout=2)
        time.sleep(1)  # for the report


def _signal(members: Iterable[psutil.Process], number: signal.Signals) -> None:
    try:
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(number)
    except psutil.AccessDenied as error:
        raise ServiceError(
            "the services were started by another user, so this one cannot stop them. Run `fedlora down` as that user."
        ) from error


def _members(processes: Mapping[str, Process]) -> set[psutil.Process]:
    """What lives of these processes, their descendants, and orphans of theirs that carry our mark."""
    marks = {_mark(name) for name in processes}
    found = {process for process in psutil.process_iter() if _marked(process, marks)}
    for process in processes.values():
        with suppress(psutil.Error):
            if is_alive(process):
                root = psutil.Process(process[0])
                found |= {root, *root.children(recursive=True)}
    return {process for process in found if _runs(process)}


def _mark(name: str) -> str:
    return f"{name} of {home.home()}"


def _marked(process: psutil.Process, marks: set[str]) -> bool:
    try:
        return process.environ().get(MARK) in marks
    except (psutil.Error, OSError):
        return False


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
