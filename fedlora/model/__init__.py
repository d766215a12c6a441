"""The frozen base in memory, and attaching and swapping adapters."""

from fedlora.model.base import load_base
from fedlora.model.known import KNOWN, resolve

__all__ = ["KNOWN", "load_base", "resolve"]
