"""Where the servers may listen: an address of this machine, on ports that are free. Checked before anything starts."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

from deployments.local.authentication import EVERYWHERE, addresses
from fedlora.errors import ConfigError

LOOPBACK = "127.0.0.1"
_EXPECTED = f"expected 127.0.0.1, {EVERYWHERE} for every IPv4 address, or an IPv4 address of this machine"


def address(host: str) -> str:
    """The address to listen on, as a server is told it.

    Raises:
        ConfigError: `host` is a name, an IPv6 address, or none of this machine.
    """
    if host == "localhost":
        return LOOPBACK
    try:
        found = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        raise ConfigError(f"--host {host!r} is no address; {_EXPECTED} (a name can mean several)") from None
    if found.version == 6:
        raise ConfigError(
            f"--host {host}: IPv6 is not supported; {_EXPECTED}, and put a proxy that speaks IPv6 in front"
        )
    if found.is_multicast or _trouble(str(found), 0):
        there = ", ".join(addresses()) or "none but 127.0.0.1"
        raise ConfigError(f"--host {host} is no address of this machine, which has {there}; {_EXPECTED}")
    return str(found)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return ipaddress.ip_address(host).is_loopback


def reached_at(host: str) -> str:
    """The address under which this machine reaches a server that listens on `host`."""
    return LOOPBACK if host == EVERYWHERE else host


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
