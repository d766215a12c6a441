"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from fedlora.errors import saving


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all (temporary file, fsync, rename).

    Raises:
        RunFolderError: it cannot be written; says why.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
