"""The frozen base in memory, and attaching and swapping adapters."""

from fedlora.model.base import KNOWN, load_base, resolve

__all__ = ["KNOWN", "load_base", "resolve"]
