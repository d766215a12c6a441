"""Folders that are to be made: whether they can be, asked before there is something to put into them."""

from __future__ import annotations

import os
from pathlib import Path

from fedlora.errors import AdapterError
from fedlora.files.limits import clean


def check_free(out: Path) -> None:
    """Refuse an output folder that is there (unless empty), or that cannot be made.

    Raises:
        AdapterError: choose another.
    """
    empty = is_folder(out) and not out.is_symlink() and not any(out.iterdir())
    if os.path.lexists(out) and not empty:
        raise AdapterError(f"{out} is there already; choose another output folder")
    if not has_room(out):
        raise AdapterError(f"{out} cannot be made: {_nearest(out)} is no folder that can be written; choose another")


def is_folder(path: Path) -> bool:
    """Whether it is one; what no file can be called is refused when it is to be made.

    Raises:
        AdapterError: the name is too long.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise AdapterError(f"{clean(str(path))}: {error.strerror}; choose another") from None


def has_room(path: Path) -> bool:
    """Whether the nearest folder above that is there can be written to."""
    above = _nearest(path)
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def _nearest(path: Path) -> Path:
    return next(above for above in path.absolute().parents if os.path.lexists(above))
