"""The frozen base in memory, and attaching and swapping adapters."""

from fedlora.model.base import KNOWN, resolve

__all__ = ["KNOWN", "resolve"]
