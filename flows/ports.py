"""Where the servers may listen: loopback only, on ports that are free. Checked before anything starts."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from fedlora.errors import ConfigError


def loopback(host: str) -> str:
    """The address to listen on.

    Raises:
        ConfigError: `host` could be reached from another machine.
    """
    if host in ("127.0.0.1", "localhost"):
        return "127.0.0.1"
    raise ConfigError(
        f"host {host!r}: the servers have no authentication yet and listen on 127.0.0.1 only. "
        "From another machine, use a tunnel: ssh -L 4200:127.0.0.1:4200 -L 5000:127.0.0.1:5000 THIS_MACHINE"
    )


def check_ports(host: str, ports: Mapping[str, int]) -> None:
    """Check, before anything starts, that every server's port is valid, free and given once.

    Raises:
        ConfigError: it names the port and the option to change.
    """
    if len(set(ports.values())) < len(ports):
        raise ConfigError(f"port {ports['prefect']} is given for both servers; pass another with --mlflow-port")
    for name, port in ports.items():
        option = f"--{name}-port"
        if not 1 <= port <= 65535:
            raise ConfigError(
                f"port {port} for the {name} server is not between 1 and 65535; pass another with {option}"
            )
        if trouble := _trouble(host, port):
            near = (other for other in range(port + 1, min(port + 100, 65536)) if not _trouble(host, other))
            free = next((other for other in near if other not in ports.values()), None)
            hint = f", for example {option} {free}" if free else ""
            raise ConfigError(
                f"port {port} for the {name} server {trouble}; stop what uses it or pass another with {option}{hint}"
            )


def _trouble(host: str, port: int) -> str:
    """Why a server cannot listen on the port; empty if it can."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: a port just left is free
        try:
            probe.bind((host, port))
        except PermissionError:
            return "needs administrator rights"
        except OSError:
            return "is in use"
    return ""
