"""A Prefect server that goes away for a while: what only its pages show is skipped or waits, and the run goes on.

States of flow runs are Prefect's own business; it tries again for as long as `PREFECT_CLIENT_MAX_RETRIES` allows
(`deployments.local.environment` sets minutes).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
from prefect.exceptions import PrefectException
from prefect.settings import get_current_settings

from deployments.local import asking, waiting

AWAY = (httpx.TransportError, httpx.HTTPStatusError, PrefectException)
"""What a server that is away, or was started again and is not ready, makes of a request."""

_ASK_AGAIN_S = 2.0


def optional(call: Callable[[], object], patience_s: float = 0.0) -> bool:
    """Make a request that a run can do without; whether it was answered.

    Args:
        call: the request.
        patience_s: how many seconds it is tried again.
    """

    def answered() -> bool:
        try:
            if not _answers():  # a request of Prefect's would be tried again for minutes
                return False
            call()
            return True
        except AWAY:
            return False

    return waiting.until(answered, time.monotonic() + patience_s, _ASK_AGAIN_S)


def _answers() -> bool:
    """Whether the server is there; without an address it is in this process."""
    url = get_current_settings().api.url
    return not url or asking.answers(url, None)
