"""Runs side by side on one self-contained page, with CSV files beside it: frames in, files out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.report.frames import Comparison, Excluded
    from fedlora.report.page import TABLES, write

__all__ = ["TABLES", "Comparison", "Excluded", "write"]

_HOMES = {
    "Comparison": "fedlora.report.frames",
    "Excluded": "fedlora.report.frames",
    "TABLES": "fedlora.report.page",
    "write": "fedlora.report.page",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: pandas is not needed to draw the pictures of one run."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
