"""Sets of files that a process on another machine needs, by the digests of their contents, and a bounded cache of them.

Whoever has the files describes them (`described`); whoever needs them has them in a folder, where the same files are
seen anyway, or out of the cache, into which they are fetched once for all processes that share it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from filelock import FileLock

from fedlora.errors import DataError, saving
from fedlora.files import digests

CHUNK = 2**26
"""Bytes of a file that are moved at a time."""


@dataclass(frozen=True)
class File:
    """A file by its content."""

    name: str
    """In the folder of its set."""
    digest: str
    """SHA-256."""
    size: int


@dataclass(frozen=True)
class FileSet:
    """Files that belong together, and the folder in which whoever described them has them."""

    folder: str
    files: tuple[File, ...]

    @cached_property
    def digest(self) -> str:
        """Of names and contents."""
        known = "\n".join(f"{file.name} {file.digest}" for file in sorted(self.files, key=lambda file: file.name))
        return hashlib.sha256(known.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def seen(self) -> bool:
        """Whether the very same files are to be had in the folder from here."""
        folder = Path(self.folder)
        try:
            sizes = all((folder / file.name).stat().st_size == file.size for file in self.files)
            return sizes and all(digests.of_file(folder / file.name) == file.digest for file in self.files)
        except OSError:
            return False


def described(folder: Path, names: Iterable[str], known: Mapping[str, str] | None = None) -> FileSet:
    """A set of files in a folder.

    Args:
        folder: which.
        names: of the files in it.
        known: digests that need not be computed, by name.

    Raises:
        OSError: one cannot be read.
    """
    given = known or {}
    files = (
        File(name, given.get(name) or digests.of_file(folder / name), (folder / name).stat().st_size) for name in names
    )
    return FileSet(str(folder), tuple(files))


def chunks(path: Path) -> Iterator[bytes]:
    """A file's content, piece by piece; one piece at least."""
    with path.open("rb") as file:
        yield file.read(CHUNK)
        while content := file.read(CHUNK):
            yield content


_LOCK = ".lock"

Fetch = Callable[[File], Iterable[bytes]]
"""The content of a file from wherever it is kept, piece by piece."""


class Cache:
    """Sets of files in a folder; those that were not asked for the longest go when there are too many bytes.

    Args:
        folder: may be shared by processes.
        most_bytes: that are kept; what is asked for just now is kept whatever its size.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most = folder, most_bytes

    def has(self, wanted: FileSet) -> bool:
        """Whether a set is there."""
        return (self._folder / wanted.digest).is_dir()

    def have(self, wanted: FileSet, fetch: Fetch) -> Path:
        """The folder with the files of a set, fetched now unless they are there.

        Raises:
            DataError: what was fetched is not what was described.
            RunFolderError: it cannot be written.
        """
        place = self._folder / wanted.digest
        with saving(place, "another FEDLORA_HOME on the worker"):
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / _LOCK):
                if not place.is_dir():
                    self._make_room(wanted)
                    self._fill(place, wanted, fetch)
                os.utime(place)
        return place

    def _fill(self, place: Path, wanted: FileSet, fetch: Fetch) -> None:
        draft = Path(tempfile.mkdtemp(prefix=".", dir=self._folder))
        try:
            for file in wanted.files:
                _write(_inside(draft, file.name), file, fetch(file))
            draft.replace(place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _make_room(self, wanted: FileSet) -> None:
        """Remove what was left half-written, and sets, those first that were not asked for the longest, until the new
        one fits. To be called with the lock held: nobody else writes here."""
        for draft in self._folder.glob(".*"):
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
        kept = sorted((path for path in self._folder.iterdir() if _is_set(path)), key=lambda path: path.stat().st_mtime)
        sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in kept}
        total = sum(sizes.values()) + wanted.size
        for path in kept:
            if total <= self._most:
                return
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]


def _is_set(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _inside(folder: Path, name: str) -> Path:
    """The place of a file of a set.

    Raises:
        DataError: its name leads out of the folder.
    """
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or PurePosixPath(name).is_absolute():
        raise DataError(f"a set of files names {name!r}, which is no place within it")
    return folder.joinpath(*parts)


def _write(path: Path, file: File, content: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for piece in content:
            digest.update(piece)
            out.write(piece)
    if digest.hexdigest() != file.digest:
        raise DataError(
            f"{file.name} was fetched and is not what was described ({path.stat().st_size} bytes, expected {file.size})"
        )
