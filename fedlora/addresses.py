"""Addresses that are written down, in run folders, parameters and logs, and so may hold no password."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

_SECRET_WORDS = ("password", "passwd", "pwd", "token", "secret", "access_key", "sslpassword")


def holds_secret(address: str) -> bool:
    """Whether an address like `http://user:password@host` or `postgresql://host/name?password=…` holds a password.

    One that cannot be read does if it has the form of the first.
    """
    try:
        parts = urlsplit(address)
        # What follows the last @ is the host: a password may itself hold @, / or #, and then hide from the parser.
        before = address.partition("://")[2].rpartition("@")[0]
        if parts.scheme in ("sqlite", "file", ""):  # a path, in which both mean themselves
            return False
        if parts.password is not None or ":" in before:
            return True
        if parts.username and parts.scheme in ("http", "https"):  # a token
            return True
        return any(word in key.lower() for key, _ in parse_qsl(parts.query) for word in _SECRET_WORDS)
    except ValueError:
        return "@" in address


def advice(address: str) -> str:
    """Where the password of such an address belongs instead."""
    if address.startswith("postgres"):
        return "leave it out of the address and set PGPASSWORD, or a line in ~/.pgpass"
    if address.startswith("http"):
        return "leave both out of the address and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    return "leave it out of the address; `mlflow server` in front of the database needs none"
