"""A Prefect server that goes away for a while: what only its pages show is skipped or waits, and the run goes on.

States of flow runs are Prefect's own business; it tries again for as long as `PREFECT_CLIENT_MAX_RETRIES` allows
(`flows.environment` sets minutes).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

AWAY = (httpx.TransportError, httpx.HTTPStatusError, PrefectException)
"""What a server that is away, or was started again and is not ready, makes of a request."""

_ASK_AGAIN_S = 2.0


def optional(call: Callable[[], object], patience_s: float = 0.0) -> bool:
    """Make a request that a run can do without; whether it was answered.

    Args:
        call: the request.
        patience_s: how many seconds it is tried again.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                call()
            return True
        except AWAY:
            if time.monotonic() >= until:
                return False
            time.sleep(_ASK_AGAIN_S)
