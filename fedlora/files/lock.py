"""One process at a time: a lock file that the system releases when its holder ends, however that happens."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        file = (folder / FILE).open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunFolderError(f"{what} is under way ({holder}); {instead}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield
