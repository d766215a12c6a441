"""One client at a time on a device, across all runs on a machine: a strict Prefect concurrency limit per device."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from fedlora.config import RunnerConfig

_LEASE_S = 60.0
"""How long a slot stays taken when its holder was killed; renewed while it lives."""


def limit_name(device: str) -> str:
    """The name of the limit that guards a device of this machine, whatever number this process knows it by."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    kind, _, index = device.partition(":")
    if kind == "cuda" and index.isdigit() and int(index) < len(visible):
        device = f"cuda-{visible[int(index)]}"
    return re.sub(r"[^a-z0-9-]+", "-", f"fedlora-{socket.gethostname()}-{device}".lower())


def is_exclusive(runner: RunnerConfig, device: str) -> bool:
    """Whether clients on this device hold its limit: as configured, otherwise on GPUs."""
    return device != "cpu" if runner.exclusive is None else runner.exclusive


def ensure_limits(devices: Iterable[str]) -> None:
    """Create the limits that are not there; one that somebody changed stays as it is."""
    with get_client(sync_client=True) as client:
        for name in sorted({limit_name(device) for device in devices}):
            try:
                client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                try:
                    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
                except ObjectAlreadyExists:
                    continue


@contextmanager
def held(runner: RunnerConfig, device: str) -> Iterator[None]:
    """Hold a device while a client trains on it; waits while another run has it.

    Strict: a limit that was deleted is an error, not a free pass. A server that goes away meanwhile is not: the
    client's work is kept, and a slot that could not be given back is free again when its lease ends.
    """
    if not is_exclusive(runner, device):
        yield
        return
    slot = concurrency(limit_name(device), strict=True, lease_duration=_LEASE_S, raise_on_lease_renewal_failure=False)
    slot.__enter__()
    try:
        yield
    finally:
        with suppress(httpx.TransportError):
            slot.__exit__(None, None, None)
