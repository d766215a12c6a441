"""One process at a time: a lock file that the system releases when its holder ends, however that happens."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fedlora.errors import RunFolderError, saving

FILE = "lock"


@contextmanager
def held(folder: Path, what: str, instead: str) -> Iterator[None]:
    """Hold the lock file of a folder within.

    Args:
        folder: made if it is not there.
        what: the thing that is locked, for the error.
        instead: what to do when another process has it.

    Raises:
        RunFolderError: another process holds it, or the folder cannot be written.
    """
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / FILE
        try:
            lock = FileLock(file, timeout=0).acquire()
        except Timeout:
            holder = file.read_text().strip() or "another process"
            raise RunFolderError(f"{what} is under way ({holder}); {instead}") from None
    with lock:
        file.write_text(f"process {os.getpid()}")
        yield
