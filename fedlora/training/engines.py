"""What a cluster needs, as far as it can be known before one is connected to; `runner.kind` says which engine it is."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from urllib.parse import urlsplit

from fedlora.config import RunnerConfig
from fedlora.errors import ConfigError

_NEEDED = {"ray": ("ray", "prefect_ray"), "dask": ("distributed", "prefect_dask")}
_BEGIN = {"ray": "`ray start --head`", "dask": "`dask scheduler` and `dask worker`"}
_WITHIN_S = 5.0


def check(runner: RunnerConfig) -> None:
    """Refuse a runner whose packages are not installed, or whose cluster does not answer.

    Raises:
        ConfigError: one line that names the key, the value and what to do.
    """
    if not runner.clustered:
        return
    if missing := [name for name in _NEEDED[runner.kind] if find_spec(name) is None]:
        raise ConfigError(
            f"runner.kind={runner.kind} needs {' and '.join(missing)}, not installed here; "
            f"pip install 'fedlora[{runner.kind}]', here and on the machines of the cluster"
        )
    if runner.address and runner.address != "auto":
        _check_answers(runner.kind, runner.address)


def _check_answers(kind: str, address: str) -> None:
    host, port = place_of(address)
    try:
        socket.create_connection((host, port), _WITHIN_S).close()
    except OSError as error:
        raise ConfigError(
            f"runner.address={address} does not answer ({error.strerror or error}); start the cluster "
            f"({_BEGIN[kind]}), or leave runner.address empty for one of this machine"
        ) from None


def place_of(address: str) -> tuple[str, int]:
    """Host and port of an address, with or without a scheme.

    Raises:
        ConfigError: it has not both.
    """
    try:
        found = urlsplit(address if "://" in address else f"//{address}")
        host, port = found.hostname, found.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ConfigError(f"runner.address={address} is no address; expected host:port, such as 10.0.0.1:6379")
    return host, port
