"""What is looked at before Prefect, a run folder or a worker is there: a mistake is told within seconds and leaves
nothing behind."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.config import RunConfig
    from fedlora.run.preflight import Found
    from fedlora.sweep.plan import Cell, Sweep


def looked_up(config: RunConfig) -> RunConfig:
    """With the adapter that it starts from copied out of MLflow's registry, where it names one there.

    Raises:
        ConfigError, TrackingError: there is none.
    """
    from fedlora.config.lora import REGISTRY

    if not (config.lora.init or "").startswith(REGISTRY):
        return config
    from mlflow_tracking import beginning

    return beginning.looked_up(config)


def before_start(config: RunConfig, folder: Path) -> Found | None:
    """Everything that can be known to be wrong with a run, and whether the servers that are named answer.

    Raises:
        FedloraError: one line that names the key, the value and what to do.
    """
    found = _of_settings(config, folder)
    servers(config)
    return found


def of_run(config: RunConfig, folder: Path) -> Found | None:
    """The same without a Prefect server; of a run that is continued, its names and folder only (None).

    Raises:
        FedloraError: one line that names the key, the value and what to do.
    """
    found = _of_settings(config, folder)
    if not (folder / "tracking.json").is_file():  # a run that is in MLflow already goes on while that is away
        tracking(config)
    return found


def _of_settings(config: RunConfig, folder: Path) -> Found | None:
    """What needs no server."""
    from fedlora.run import preflight

    found = preflight.before_run(config, folder)
    if found is None:
        preflight.names(config)
    return found


def of_sweep(plan: Sweep, finished: Collection[str] = ()) -> dict[str, str]:
    """Why runs of a sweep cannot begin, by their digest; the other runs need not suffer for that.

    Args:
        plan: the sweep.
        finished: digests of runs that are not looked at.

    Raises:
        FedloraError: none of its runs can.
    """
    from fedlora.errors import FedloraError
    from fedlora.run import preflight

    refused: list[tuple[Cell, FedloraError]] = []
    for cell in plan.cells:
        if cell.digest not in finished:
            try:
                preflight.check(cell.config)
            except FedloraError as error:
                refused.append((cell, error))
    if len(refused) == len(plan.cells):
        first, why = refused[0]
        raise type(why)(f"sweep {plan.name}: no run can begin; the first, {first.label}: {why}")
    return {cell.digest: str(why) for cell, why in refused}


def stores_of(plan: Sweep) -> list[RunConfig]:
    """One configuration for every tracking store and experiment of a sweep."""
    return list({cell.config.tracking.model_dump_json(): cell.config for cell in plan.cells}.values())


def tracking(config: RunConfig) -> None:
    """Whether the tracking store answers and takes runs of the experiment.

    Raises:
        TrackingError: it does not.
    """
    from mlflow_tracking import store

    uri = store.resolve_uri(config.tracking.uri)
    store.check(uri)
    store.check_experiment(uri, config.tracking.experiment)


def servers(config: RunConfig) -> None:
    """Whether the tracking store and the Prefect server that are named answer.

    Raises:
        FedloraError: one of them does not.
    """
    from deployments.local import asking  # which imports an HTTP client

    tracking(config)
    asking.check_prefect()
