"""Runs side by side on one self-contained page, with CSV files beside it: frames in, files out."""

from __future__ import annotations

from fedlora.report.frames import Comparison, Excluded
from fedlora.report.page import TABLES, write

__all__ = ["TABLES", "Comparison", "Excluded", "write"]
