"""What the command line looks at before it starts Prefect: a mistake is told within seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows import environment

if TYPE_CHECKING:
    from fedlora.config import RunConfig


def before_start(config: RunConfig) -> None:
    """Everything that can be known to be wrong with a run, and whether the servers that are named answer.

    Raises:
        FedloraError: one line that names the key, the value and what to do.
    """
    from fedlora import preflight

    preflight.check(config)
    servers(config)


def servers(config: RunConfig) -> None:
    """Whether the tracking store and the Prefect server that are named answer.

    Raises:
        FedloraError: one of them does not.
    """
    from mlflow_tracking import store

    store.check(store.resolve_uri(config.tracking.uri))
    environment.check_prefect()
