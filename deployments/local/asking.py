"""The few requests that commands and the launcher make to servers, without importing Prefect or MLflow, which takes
seconds: whether they answer, whether they let in whom they should, and what work pools and workers there are."""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import certifi
import httpx

from deployments.local import authentication
from deployments.local.environment import Services
from deployments.local.processes import ServiceError
from fedlora.config.addresses import LOOPBACK
from fedlora.errors import FedloraError
from fedlora.files import home

CPU_POOL, GPU_POOL = "cpu-workers", "gpu-workers"
POOLS = (CPU_POOL, GPU_POOL)
_BUSY_FOR_S = 60.0


def client_of(url: str, login: str | None = None, timeout: float = 5.0) -> httpx.Client:
    """For a few requests below `url`: past proxies on this machine, with Prefect's own variables for certificates.

    Args:
        url: Of a server; requests name a path below it, or an address.
        login: `USER:PASSWORD`, empty for a stranger. None: what the environment holds for clients of Prefect.
        timeout: Seconds for one answer.
    """
    context: ssl.SSLContext | bool = False  # nothing to verify, and certificates take a while to load
    if url.startswith("https:"):
        authority = os.environ.get("PREFECT_API_SSL_CERT_FILE") or os.environ.get("SSL_CERT_FILE") or certifi.where()
        context = ssl.create_default_context(cafile=authority)
    headers = authentication.header(os.environ.get(authentication.PREFECT_CLIENT, "") if login is None else login)
    if login is None and not headers and (key := os.environ.get("PREFECT_API_KEY")):
        headers = {"Authorization": f"Bearer {key}"}
    host = urlsplit(url).hostname
    here = host in LOOPBACK or host in authentication.addresses()
    return httpx.Client(base_url=url, headers=headers, verify=context, timeout=timeout, trust_env=not here)


def ours(prefect_url: str) -> httpx.Client:
    """To a Prefect server of ours, whose password the environment may hold as the server's own."""
    return client_of(prefect_url, authentication.prefect_login(), 2.0)


def answers(url: str, login: str | None = "") -> bool:
    """Whether a server, of Prefect (its API) or MLflow, answers its health check; ours ask nobody there."""
    try:
        with client_of(url, login) as client:
            return client.get("health").is_success
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        return False


def check_prefect() -> None:
    """Make sure that a Prefect server which is named also answers, and lets us in; without one, Prefect starts its own.

    Raises:
        FedloraError: it does not answer within seconds, or wants another user and password.
    """
    url = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    if not url:
        return
    try:
        with client_of(url) as client:
            client.get("health").raise_for_status()
            refused = client.get("admin/version").status_code == httpx.codes.UNAUTHORIZED
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise FedloraError(
            f"the Prefect server at {url} does not answer ({error}). Start it (`fedlora up`), or unset PREFECT_API_URL "
            "to run without one"
        ) from None
    if refused and not os.environ.get("PREFECT_API_KEY"):
        raise FedloraError(_wants_a_password(url, bool(os.environ.get(authentication.PREFECT_CLIENT))))


def _wants_a_password(url: str, another: bool = False) -> str:
    return (
        f"the Prefect server at {url} wants {'another' if another else 'a'} user and password; set "
        f"{authentication.PREFECT_CLIENT} to USER:PASSWORD in the environment"
    )


def ask(client: httpx.Client, path: str, body: dict[str, Any] | None = None) -> Any:
    """What a Prefect server tells about a filter, such as `flow_runs/count`.

    Raises:
        httpx.HTTPError: it does not answer, or refuses.
    """
    return client.post(path, json=body or {}).raise_for_status().json()


def has_worker(prefect_url: str, pool: str) -> bool:
    """Whether a worker of the pool has told the server that it is there."""
    try:
        with ours(prefect_url) as client:
            return "ONLINE" in [worker["status"] for worker in ask(client, f"work_pools/{pool}/workers/filter")]
    except httpx.HTTPError:
        return False


def ensure_pools(prefect_url: str, limits: Mapping[str, int | None], usual: Mapping[str, int]) -> None:
    """Make the pools before workers and deployments ask for them. Workers bring their job template.

    Args:
        prefect_url: Address of the API.
        limits: Flow runs at a time, by pool; None: as it is, since somebody may have changed it, or the usual one.
        usual: What a new pool gets.

    Raises:
        ServiceError: the server refuses, perhaps because it wants a password.
    """
    with ours(prefect_url) as client:
        for pool, limit in limits.items():
            new = {"name": pool, "type": "process", "concurrency_limit": usual[pool] if limit is None else limit}
            try:
                answer = _insist(client, "POST", "work_pools/", new)
                if answer.status_code != httpx.codes.CONFLICT:  # there from an earlier `up`
                    answer.raise_for_status()
                elif limit is not None:
                    _insist(client, "PATCH", f"work_pools/{pool}", {"concurrency_limit": limit}).raise_for_status()
            except httpx.HTTPError as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED:
                    raise ServiceError(_wants_a_password(prefect_url)) from None
                raise ServiceError(
                    f"the Prefect server at {prefect_url} did not create the work pool {pool}: {error}"
                ) from error


def _insist(client: httpx.Client, method: str, path: str, body: Any) -> httpx.Response:
    """Asked again while the server does not answer, or says that its database is busy."""
    deadline = time.monotonic() + _BUSY_FOR_S
    while True:
        try:
            answer = client.request(method, path, json=body)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                return answer
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def verify(services: Services) -> None:
    """Call servers that are to ask who is calling as a stranger, who must be turned away, and with our own passwords.

    Tried at every such start, since nothing else would show it.

    Raises:
        ServiceError: a server lets strangers in, or us not. Nothing of it may stay running then.
    """
    _verify(
        "Prefect server",
        f"{services.prefect_url}/admin/version",
        authentication.prefect_login(),
        f"set {authentication.PREFECT_CLIENT} to what {authentication.PREFECT_SERVER} says",
    )
    _verify(
        "MLflow server",
        f"{services.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=1",
        ":".join(authentication.mlflow_login() or ()),
        f"its users and their passwords are in {home.mlflow_auth_database()} since its first start, and later ones do "
        f"not change them: set {authentication.USER} and {authentication.PASSWORD} to one of them",
    )


def _verify(title: str, url: str, login: str, cure: str) -> None:
    try:
        with client_of(url, "", 10.0) as nobody, client_of(url, login, 10.0) as somebody:
            stranger, ours = (client.get(url).status_code for client in (nobody, somebody))
    except httpx.HTTPError as error:
        raise ServiceError(f"{url} does not answer: {error}") from error
    if stranger != httpx.codes.UNAUTHORIZED:
        raise ServiceError(
            f"the {title} answers {stranger} to {url} without a password, expected {httpx.codes.UNAUTHORIZED:d}; "
            "it was stopped, for anybody could use it"
        )
    if ours != httpx.codes.OK:
        raise ServiceError(
            f"the {title} answers {ours} to {url} with the user and password of the environment, expected "
            f"{httpx.codes.OK:d}; {cure}"
        )
