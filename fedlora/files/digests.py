"""The SHA-256 of files, looked up where size and time of change are known."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from fedlora.files import home
from fedlora.files.atomic import Stamp, stamp, write_atomic

_SMALL = 1_000_000
"""Bytes up to which a file is read again rather than looked up on disk."""


def of_file(path: Path) -> str:
    """SHA-256 of a file; this process remembers it for as long as path, size and time of change stay.

    Raises:
        OSError: it cannot be read.
    """
    return _of(path, stamp(path))


@lru_cache(maxsize=4096)
def _of(path: Path, state: Stamp | None) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_lasting_file(path: Path) -> str:
    """The same for a file that stays as it is for long, such as a model's: large ones are remembered under the cache.

    Raises:
        OSError: it cannot be read.
    """
    stat = path.stat()
    if stat.st_size <= _SMALL:
        return of_file(path)
    known_as = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    kept = home.cache() / "digests" / hashlib.sha256(known_as.encode()).hexdigest()
    try:
        found = kept.read_text("utf-8")
        if len(found) == 64:
            return found
    except (OSError, ValueError):
        pass
    digest = of_file(path)
    write_atomic(kept, digest.encode())
    return digest
