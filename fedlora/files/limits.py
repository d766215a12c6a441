"""How much is taken from a file that may come from anyone, and from where: looked at before anything is read."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOATS = frozenset({"F32", "F16", "BF16", "F64"})
"""The types, as safetensors names them, that hold real numbers."""
LARGEST_JSON = 10_000_000
"""Bytes of a JSON file beside an adapter."""
_DEEPEST = 30
_NESTING = (list, dict)
_LONGEST_LINE = 300


@dataclass(frozen=True)
class Limits:
    """What a safetensors file may hold; the default is for files from anyone."""

    header_bytes: int = 16 * 2**20
    """Names, types and shapes of all tensors: some 150 bytes each in adapters."""
    tensors: int = 100_000
    """An adapter of all linear layers of 128 experts in 48 layers has 37,000."""
    total_bytes: int = 64 * 2**30
    """The whole file. Tensors are read one module at a time where they can be."""
    dtypes: frozenset[str] = FLOATS
    empty: bool = False
    """Whether a dimension may be zero."""


UPLOAD = Limits()
OWN = Limits(100_000_000, 1_000_000, 2**62, FLOATS | {"I64", "I32", "I16", "I8", "U8", "BOOL"}, empty=True)
"""For what this installation wrote itself, such as a server's state with the adapters of all its clients."""


def short(value: Any, most: int = 80) -> str:
    """A value from a stranger for a message: its repr, printable, at most `most` characters and an ellipsis."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return clean(text, most)


def clean(text: str, most: int = _LONGEST_LINE) -> str:
    """One printable line of at most `most` characters and an ellipsis."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: most + 1])
    return line if len(line) <= most else f"{line[:most]} …"


def file_within(folder: Path, name: str) -> Path:
    """The file of that name in a folder from anyone; a link may lead to another place in the folder, or to the blobs of
    the Hugging Face cache that the folder is a snapshot in, and nowhere else.

    Raises:
        OSError: it leads out of the folder, or cannot be looked at. Whether it is there is not checked.
    """
    path = folder / name
    try:
        target, root = path.resolve(), folder.resolve()
    except (RuntimeError, ValueError) as error:  # links in a circle, names with a null
        raise OSError(f"{clean(str(error))}") from None
    cached = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not (cached or target.is_relative_to(root)):
        raise OSError(f"{name} is a link that leads out of the folder; put the file itself there")
    return path


FileStates = tuple[tuple[str, int, int], ...]
"""Files by path, with size and time of change: what was found in them holds for as long as these stay."""


def states(paths: Iterable[Path]) -> FileStates:
    """How files are now, in the order of their paths.

    Raises:
        OSError: one cannot be looked at.
    """
    found = ((path, path.stat()) for path in sorted(paths))
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in found)


def read_text(path: Path, most: int) -> str:
    """A UTF-8 file of at most `most` bytes.

    Raises:
        OSError: not a file (a folder, a pipe, a device), larger, or not readable.
        ValueError: not UTF-8.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"more than {most} bytes are too many")
    return content.decode("utf-8")


_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST_POINTER = 1024


def is_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in a checkout in place of the real one."""
    try:
        if check_regular(path).st_size > _LARGEST_POINTER:
            return False
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def refuse_pointer(path: Path) -> None:
    """Raise what helps where a file is only a pointer.

    Raises:
        ValueError: it is one of Git LFS.
    """
    if is_pointer(path):
        raise ValueError("it is a pointer of Git LFS, not the file itself; fetch the file with `git lfs pull`")


def check_regular(path: Path) -> os.stat_result:
    """Opening a pipe would wait for ever, and a device has no end.

    Raises:
        OSError: not there, or not a file.
    """
    try:
        found = path.stat()
    except ValueError as error:
        raise OSError(str(error)) from None
    except OSError as error:
        raise OSError(error.strerror or "not readable") from None
    if not stat.S_ISREG(found.st_mode):
        raise OSError("not a file")
    return found


def read_json(path: Path, most: int = LARGEST_JSON) -> Any:
    """The content of a JSON file from anyone.

    Raises:
        OSError: not a file, or larger than `most` bytes.
        ValueError: not JSON, nested too deeply, a key twice, text that is not Unicode, or a pointer of Git LFS.
    """
    refuse_pointer(path)
    try:
        content = json.loads(read_text(path, most), object_pairs_hook=once)
    except RecursionError:
        raise ValueError(f"nested deeper than {_DEEPEST} levels") from None
    _check_depth(content)
    return content


def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object, each key once.

    Raises:
        ValueError: a key is there twice, and programs differ in which of the two counts.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {short(twice)} is there twice")
    return content


def _check_depth(content: Any) -> None:
    """Deep content would stop whoever goes through it later, by recursion."""
    level = [content] if isinstance(content, _NESTING) else []
    for _ in range(_DEEPEST):
        if not level:
            return
        inner = [value if isinstance(value, list) else value.values() for value in level]
        level = [value for values in inner for value in values if isinstance(value, _NESTING)]
    if level:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
