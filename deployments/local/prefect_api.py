"""The few requests that the launcher makes to a Prefect server, without importing Prefect."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import httpx

from deployments.local import authentication
from deployments.local.processes import ServiceError

CPU_POOL, GPU_POOL = "cpu-workers", "gpu-workers"
POOLS = (CPU_POOL, GPU_POOL)


def call(method: str, url: str, body: Any = None) -> httpx.Response:
    """One request to a Prefect server of ours, past any proxy, with user and password if the environment has them."""
    headers = authentication.header(authentication.prefect_login())
    return httpx.request(method, url, json=body, headers=headers, timeout=2.0, trust_env=False)


def insist(method: str, url: str, body: Any = None, seconds: float = 60.0) -> httpx.Response:
    """The same of a server that may be busy: asked again while it does not answer, or says that its database is.

    Raises:
        httpx.HTTPError: it has not answered until the time was up.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            answer = call(method, url, body)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                return answer
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def has_worker(prefect_url: str, pool: str) -> bool:
    """Whether a worker of the pool has told the server that it is there."""
    workers = call("POST", f"{prefect_url}/work_pools/{pool}/workers/filter", {}).raise_for_status().json()
    return any(worker["status"] == "ONLINE" for worker in workers)


def ensure_pools(prefect_url: str, limits: Mapping[str, int | None], usual: Mapping[str, int]) -> None:
    """Make the pools before workers and deployments ask for them. Workers bring their job template.

    Args:
        prefect_url: Address of the API.
        limits: Flow runs at a time, by pool; None: as it is, since somebody may have changed it, or the usual one.
        usual: What a new pool gets.

    Raises:
        ServiceError: the server refuses, perhaps because it wants a password.
    """
    for pool, limit in limits.items():
        new = {"name": pool, "type": "process", "concurrency_limit": usual[pool] if limit is None else limit}
        try:
            answer = insist("POST", f"{prefect_url}/work_pools/", new)
            if answer.status_code != httpx.codes.CONFLICT:  # there from an earlier `up`
                answer.raise_for_status()
            elif limit is not None:
                insist("PATCH", f"{prefect_url}/work_pools/{pool}", {"concurrency_limit": limit}).raise_for_status()
        except httpx.HTTPError as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
                raise ServiceError(
                    f"the Prefect server at {prefect_url} wants a user and password; set "
                    f"{authentication.PREFECT_CLIENT} to USER:PASSWORD in the environment"
                ) from None
            raise ServiceError(
                f"the Prefect server at {prefect_url} did not create the work pool {pool}: {error}"
            ) from error
