"""`fedlora.adapter.updates`, where plug-ins have always found it."""

from fedlora.adapter.updates import Update, Updates

__all__ = ["Update", "Updates"]
