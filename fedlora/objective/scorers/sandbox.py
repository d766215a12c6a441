"""Runs a Python program that nobody has read, with little to do harm by.

A process of its own, without the environment's variables, in a temporary folder, with limits of time, memory, file size
and processes; where the kernel allows it in namespaces of its own: by bubblewrap, without network and with every other
file read-only, or by `unshare`, without network. It is no virtual machine: a fault of the kernel is a way out.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

SECONDS, MEMORY, FILE_BYTES = 10, 512 * 2**20, 2**20
"""Of wall and of processor time; of address space; of the largest file, in bytes."""

_PASSED = 0
_BEGIN = """
import os, resource, sys
seconds, memory, size = map(int, sys.argv[1:4])
for what, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, size),
                   (resource.RLIMIT_NPROC, 1), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 32)):
    resource.setrlimit(what, (most, most))
with open("program.py", encoding="utf-8") as file:
    program = file.read()
sys.argv[:] = ["program.py"]
exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
with open("passed", "w") as file:
    file.write("")
"""
"""Sets the limits on itself, and then runs the program. What ends it early, by whatever exit code, leaves no mark."""


class Isolation(NamedTuple):
    """What surrounds the process."""

    command: tuple[str, ...] = ()
    user: int | None = None
    """Whose rights it has, instead of ours."""

    @property
    def words(self) -> str:
        """What it can still do."""
        way = self.command[0] if self.command else ""
        reach = {"bwrap": "no network, and files are read-only", "unshare": "no network"}.get(way, "")
        rights = "those of nobody" if self.user else "yours"
        return f"{reach or 'the network within reach'}; rights: {rights}"


_BWRAP = (
    "bwrap --ro-bind / / --dev /dev --proc /proc --bind . /mnt --chdir /mnt --unshare-all --die-with-parent "
    "--new-session --cap-drop ALL"
)
_UNSHARE = "unshare --user --map-root-user --net --ipc --pid --fork --kill-child"
_COMMANDS = tuple(tuple(command.split()) for command in (_BWRAP, _UNSHARE, ""))
_NOBODY = 65534


@cache
def isolation() -> Isolation:
    """The best that this machine allows. Who is root, whom no limit of processes binds, hands them to nobody."""
    users = (_NOBODY, None) if os.geteuid() == 0 else (None,)
    ways = [Isolation(command, user) for command in _COMMANDS for user in users]
    works = (way for way in ways if (not way.command or shutil.which(way.command[0])) and _works(way))
    return next(works, Isolation())


def unfit() -> str | None:
    """Why nothing may be run on this platform; None where it may."""
    try:
        import resource  # noqa: F401
    except ImportError:
        return f"{sys.platform} has no limits for processes; choose another scorer, or use Linux or macOS"
    return None


def run(program: str, seconds: int = SECONDS, within: Isolation | None = None) -> str | None:
    """Run a Python program.

    Args:
        program: its text.
        seconds: it may take.
        within: what surrounds it; the best there is.

    Returns:
        None where it came to its end; else why it did not, in a line.
    """
    way = isolation() if within is None else within
    with tempfile.TemporaryDirectory(prefix="fedlora-code-", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        (place / "program.py").write_text(program, encoding="utf-8", errors="replace")
        if way.user is not None:
            os.chown(place, way.user, way.user)
        begin = [sys.executable, "-I", "-B", "-c", _BEGIN, str(seconds), str(MEMORY), str(FILE_BYTES)]
        with (place / "errors").open("wb") as errors:
            process = subprocess.Popen(
                [*way.command, *begin],
                cwd=place,
                env={"PATH": os.defpath},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                user=way.user,
                group=way.user,
                extra_groups=None if way.user is None else [],
            )
        try:
            process.wait(seconds + 1)
        except subprocess.TimeoutExpired:
            return f"it took more than {seconds} s"
        finally:
            _end(process)
        if (place / "passed").exists() and process.returncode == _PASSED:
            return None
        return _last_line(place / "errors") or f"it ended with exit code {process.returncode}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it with all that it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(file: Path) -> str:
    with file.open("rb") as errors:
        errors.seek(max(0, file.stat().st_size - 2000))
        lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:200] if lines else ""


def _works(way: Isolation) -> bool:
    try:
        return run("assert 1 + 1 == 2", within=way) is None
    except OSError:  # whose rights it would have may not start Python here
        return False
