"""Runs side by side on one self-contained page, with CSV files beside it: frames in, files out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora import lazily

if TYPE_CHECKING:
    from fedlora.report.frames import Comparison, Excluded
    from fedlora.report.page import CHANGES, TABLES, VERDICT, write, write_changes

__all__ = ["CHANGES", "TABLES", "VERDICT", "Comparison", "Excluded", "write", "write_changes"]

# Pandas is not needed to draw the pictures of one run.
__getattr__ = lazily(
    __name__,
    {
        "Comparison": "fedlora.report.frames",
        "Excluded": "fedlora.report.frames",
        "CHANGES": "fedlora.report.page",
        "TABLES": "fedlora.report.page",
        "VERDICT": "fedlora.report.page",
        "write": "fedlora.report.page",
        "write_changes": "fedlora.report.page",
    },
)
