"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora.errors import saving

_LISTS = (list, tuple)
_NESTED = (*_LISTS, dict)


def write_atomic(path: Path, content: bytes, durable: bool = True) -> None:
    """Write a file so that it is there whole or not at all (temporary file, fsync, rename).

    Args:
        path: of the file.
        content: of the file.
        durable: wait until it is on the disk. Without, it is whole for every process, also after this one was killed;
            after a power failure it may be torn, so that whoever reads it must know its digest.

    Raises:
        RunFolderError: it cannot be written; says why.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


Stamp = tuple[int, int, int]
"""What changes when a file is written again."""


def stamp(path: Path) -> Stamp | None:
    """Of a file as it is now; None where there is none. What was read of a file holds while its stamp does."""
    try:
        return stamped(path.stat())
    except OSError:
        return None


def stamped(found: os.stat_result) -> Stamp:
    """The stamp of a file that the system has told of."""
    return found.st_mtime_ns, found.st_ino, found.st_size


def write_json(path: Path, content: Any, allow_nan: bool = True, durable: bool = True) -> None:
    """Write a value as JSON, so that it is there whole or not at all (`durable`: as for `write_atomic`)."""
    write_atomic(path, (laid_out(content, allow_nan) + "\n").encode(), durable)


def laid_out(content: Any, allow_nan: bool = True) -> str:
    """JSON to be read by people too: a line for each entry of a mapping, in a list of lists or mappings for each of
    these, and one for a list of numbers. Of long tables it takes a fraction of the time of `indent`, which goes number
    by number (a fifth, of 5,000 rows of 20).

    Raises:
        ValueError: a number is not finite, without `allow_nan`.
    """
    return _laid_out(content, json.JSONEncoder(allow_nan=allow_nan).encode, "\n ")


def _laid_out(content: Any, encode: Callable[[Any], str], begin: str) -> str:
    if content and isinstance(content, dict):
        keys = [encode(key) if isinstance(key, str) else encode({key: 0})[1:-4] for key in content]
        values = [_laid_out(value, encode, begin + " ") for value in content.values()]
        lines = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
        return f"{{{begin}{f',{begin}'.join(lines)}{begin[:-1]}}}"
    if isinstance(content, _LISTS) and any(isinstance(value, _NESTED) for value in content):
        return f"[{begin}{f',{begin}'.join(map(encode, content))}{begin[:-1]}]"
    return encode(content)


def check_writable(folder: Path) -> None:
    """Whether a folder could be made, or written where it is there; nothing is made.

    Raises:
        RunFolderError: it could not, as far as permissions and what is in the way tell.
    """
    with saving(folder):
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def new_folder(path: Path, instead: str = "another output folder") -> Iterator[Path]:
    """A folder that is filled beside `path` and moved there at the end; nothing is left of it where that fails.

    Args:
        path: where it will be.
        instead: what to choose where it cannot be written.

    Raises:
        RunFolderError: it cannot be written; says why.
    """
    with saving(path, instead):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield draft
            draft.chmod(0o755)
            draft.replace(path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
