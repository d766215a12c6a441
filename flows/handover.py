"""Flow runs that workers elsewhere execute: sent to a work pool, waited for, cancelled."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterTags,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelling

from deployments.local import waiting
from fedlora.errors import ConfigError, counted, did_you_mean
from flows.progress import Progress

FLOW = "federated"
_SOMEBODY_WITHIN_S = 6.0
_POLL_S = 2.0
_REMIND_S = 60.0


def check(pool: str, patience: float = _SOMEBODY_WITHIN_S) -> str:
    """The deployment of the flow `federated` in a work pool on which somebody works.

    Args:
        pool: name of the work pool.
        patience: seconds to wait for a worker to report.

    Raises:
        ConfigError: no such pool, no deployment of the flow in it, or no worker online.
    """
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            there = sorted(found.name for found in client.read_work_pools())
            raise ConfigError(
                f"there is no work pool '{pool}'.{did_you_mean(pool, there)} There are: {', '.join(there) or 'none'}. "
                f"Make one: prefect work-pool create {pool} --type process"
            ) from None
        deployments = client.read_deployments(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        )
        if not deployments:
            raise ConfigError(
                f"work pool '{pool}' has no deployment of the flow '{FLOW}'; `fedlora up` makes them, or "
                "`prefect deploy --prefect-file deployments/prefect.yaml --all`"
            )
        if not waiting.until(lambda: anybody(client, pool), time.monotonic() + patience, every=0.5):
            raise ConfigError(
                f"no worker is online in work pool '{pool}', so nothing would run; start one: "
                f"prefect worker start --pool {pool}"
            )
    preferred = sorted(deployments, key=lambda found: (found.name not in ("custom", "gpu"), found.name))
    return f"{FLOW}/{preferred[0].name}"


def anybody(client: SyncPrefectClient, pool: str) -> bool:
    """Whether a worker of the pool is online."""
    answer = client.request(
        "POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": pool}, json={}
    )
    workers = answer.json()
    return any(worker["status"] == "ONLINE" for worker in workers)


@dataclass
class Post:
    """Flow runs on their way through one work pool."""

    pool: str
    deployment: str
    owner: str
    told: Progress
    _reminded: float = field(default_factory=time.monotonic)

    @classmethod
    def at(cls, pool: str, owner: str, told: Progress) -> Post:
        """Check the pool and open for sending.

        Raises:
            ConfigError: as `check`.
        """
        deployment = check(pool)
        _check_room(pool)
        return cls(pool, deployment, owner, told)

    def send(self, key: str, name: str, parameters: dict[str, Any]) -> UUID:
        """Have a flow run executed; one with the same key of the same owner that is still on its way is taken up."""
        tags = [f"sweep:{self.owner}", f"cell:{key}"]
        with get_client(sync_client=True) as client:
            for found in client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=tags))):
                if found.state and not found.state.is_final():
                    return found.id
        run: Any = run_deployment(self.deployment, parameters=parameters, flow_run_name=name, timeout=0, tags=tags)
        return UUID(str(run.id))

    def ended(self, under_way: Collection[UUID]) -> Iterator[tuple[UUID, str | None]]:
        """Those that have ended since, each with what went wrong; waits a moment where none has."""
        with get_client(sync_client=True) as client:
            runs = [client.read_flow_run(run) for run in under_way]
            final = [run for run in runs if run.state and run.state.is_final()]
            yield from ((run.id, _trouble(run)) for run in final)
            if not final:
                self._remind(client, runs)
                time.sleep(_POLL_S)

    def cancel(self, under_way: Collection[UUID]) -> None:
        """Cancel what is on its way: its workers stop it."""
        with get_client(sync_client=True) as client:
            for run in under_way:
                try:
                    client.set_flow_run_state(run, Cancelling(message="The sweep was stopped."))
                except PrefectException:
                    continue

    def _remind(self, client: SyncPrefectClient, runs: Collection[FlowRun]) -> None:
        """Say so, once a minute, when runs wait and nobody is there to take them."""
        nobody = any(run.state and run.state.is_scheduled() for run in runs) and not anybody(client, self.pool)
        if nobody and time.monotonic() - self._reminded > _REMIND_S:
            self._reminded = time.monotonic()
            self.told.say(
                f"no worker is online in work pool '{self.pool}'; waiting for one: {counted(len(runs), 'run')}"
            )


def _check_room(pool: str) -> None:
    """A sweep that occupies the only place of a pool would wait for ever for its runs to get it.

    Raises:
        ConfigError: that would happen.
    """
    if not runtime.flow_run.id:
        return
    with get_client(sync_client=True) as client:
        own = client.read_flow_run(UUID(str(runtime.flow_run.id))).work_pool_name
        limit = client.read_work_pool(pool).concurrency_limit
    if own == pool and limit == 1:
        raise ConfigError(
            f"this sweep occupies the only place of work pool '{pool}', so its runs could never begin; raise the limit "
            f"(prefect work-pool update {pool} --concurrency-limit 3) or leave pool empty"
        )


def _trouble(run: FlowRun) -> str | None:
    if run.state is None or run.state.is_completed():
        return None
    words = (run.state.message or "no reason given").strip().splitlines()[0]
    return f"{run.state.name} on its worker: {words} (Prefect flow run {run.id})"
