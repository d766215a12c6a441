"""Whether servers that are to ask who is calling do so: tried at every start, since nothing else would show it."""

from __future__ import annotations

import httpx

from deployments.local import authentication
from deployments.local.environment import Services
from deployments.local.processes import ServiceError
from fedlora.files import home

_WITHIN_S = 10.0


def verify(services: Services) -> None:
    """Call both servers as a stranger, who must be turned away, and with our own passwords.

    Raises:
        ServiceError: a server lets strangers in, or us not. Nothing of it may stay running then.
    """
    prefect, mlflow = authentication.prefect_login(), authentication.mlflow_login()
    _verify(
        "Prefect server",
        f"{services.prefect_url}/admin/version",
        prefect,
        f"set {authentication.PREFECT_CLIENT} to what {authentication.PREFECT_SERVER} says",
    )
    _verify(
        "MLflow server",
        f"{services.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=1",
        ":".join(mlflow) if mlflow else "",
        f"its users and their passwords are in {home.mlflow_auth_database()} since its first start, and later ones do "
        f"not change them: set {authentication.USER} and {authentication.PASSWORD} to one of them",
    )


def _verify(title: str, url: str, login: str, cure: str) -> None:
    stranger, ours = _answer(url, ""), _answer(url, login)
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


def _answer(url: str, login: str) -> int:
    try:
        answer = httpx.get(url, headers=authentication.header(login), timeout=_WITHIN_S, trust_env=False)
    except httpx.HTTPError as error:
        raise ServiceError(f"{url} does not answer: {error}") from error
    return answer.status_code
