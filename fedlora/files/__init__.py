"""Bytes on disk: whole or not at all, and bounded before they are read."""
