"""Addresses: those that are written down, in run folders, parameters and logs, may hold no password; those of this
machine are never asked through a proxy."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl, urlsplit

from fedlora.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_READ = ("http_proxy", "https_proxy", "all_proxy")
_SCHEMES = ("http", "https", "socks5", "socks5h")
_SECRET_WORDS = ("password", "passwd", "pwd", "token", "secret", "access_key", "sslpassword")


def holds_secret(address: str) -> bool:
    """Whether an address like `http://user:password@host` or `postgresql://host/name?password=…` holds a password.

    One that cannot be read does if it has the form of the first.
    """
    try:
        parts = urlsplit(address)
        # What follows the last @ is the host: a password may itself hold @, / or #, and then hide from the parser.
        before = address.partition("://")[2].rpartition("@")[0]
        if parts.scheme.partition("+")[0] in ("sqlite", "file", ""):  # a path, in which both mean themselves
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


def direct(environ: Mapping[str, str], *hosts: str) -> dict[str, str]:
    """What to set, so that HTTP clients in a process with these variables call this machine, and `hosts`, directly.

    Everything else goes on through the user's proxies, or past them where the user's own NO_PROXY says so. Nothing is
    to be set where no proxy is: the variable would hide those of the operating system.

    Raises:
        ConfigError: a proxy of a kind that the clients of Prefect, MLflow and Hugging Face do not speak; they stumble
            over it wherever a request goes. The message does not hold its address, which may hold a password.
    """
    found = {name: _spoken(name, value) for name, value in environ.items() if name.lower() in _READ and value}
    if not found:
        return {}
    exempt = [environ.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    words = [word.strip() for text in exempt for word in text.split(",") if word.strip()]
    # A star counts only where it stands alone; clients read either spelling, and some only one of them.
    listed = "*" if "*" in words else ",".join(dict.fromkeys([*words, *LOOPBACK, *filter(None, hosts)]))
    return {**found, "NO_PROXY": listed, "no_proxy": listed}


def _spoken(name: str, value: str) -> str:
    """A proxy's address as every client reads it: desktops write `socks://`, which few clients know."""
    scheme, slashes, rest = value.partition("://")
    if not slashes:  # host:port, which all take for http
        return value
    if scheme.lower() == "socks":
        return f"socks5://{rest}"
    if scheme.lower() not in _SCHEMES:
        raise ConfigError(
            f"{name} names a proxy of the kind '{scheme}'; expected {', '.join(_SCHEMES)}. Set it to one of these, or "
            "unset it"
        )
    return value
