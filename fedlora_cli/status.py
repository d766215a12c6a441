"""`fedlora status`: what is true now, for a person."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import typer

from deployments.local import environment
from fedlora.files import home

if TYPE_CHECKING:
    from deployments.local.server_log import Failure
    from deployments.local.standing import Next, Pool, Server, Standing

_WIDTH = 100
_FIRST = 6
"""So many next runs are shown."""


def status() -> None:
    """What runs now: servers, workers, pools, the next scheduled runs, and what failed.

    Ends with code 1 where nothing runs, something that should run does not, or runs wait that nothing will take.
    """
    environment.prepare()
    from deployments.local import standing

    found = standing.look()
    print("\n".join(lines(found, datetime.now().astimezone())))
    if not found.well:
        raise typer.Exit(1)


def lines(found: Standing, now: datetime) -> list[str]:
    """What is printed, in 100 columns but for paths and addresses."""
    if not found.servers:
        return [f"nothing runs: no server or worker of `fedlora up` with the home {home.home()}", "start: fedlora up"]
    told = ["servers and workers", *_servers(found)]
    if found.pools:
        told += ["pools", *(_cut(line) for line in _pools(found.pools))]
    if found.schedules:
        told += ["next runs", *(_cut(line) for line in _next(found, now))]
    elif found.pools:
        told += ["next runs", "  none: no deployment has an active schedule"]
    if found.trouble:
        told.append(_cut(f"unknown: {found.trouble}"))
    return [*told, *_failed(found.failed, found)]


def _servers(found: Standing) -> Iterator[str]:
    if not any(each.well for each in found.servers):
        yield "  NOTHING RUNS; `fedlora up` starts servers and workers again"
    places = max(len(each.place) for each in found.servers)
    for each in found.servers:
        yield _cut(f"  {each.title:<10}  {_state(each):<16}  {each.place:<{places}}  {each.remark}".rstrip())
        if not each.well and each.log:
            yield f"              its log: {each.log}"


def _state(server: Server) -> str:
    return server.state if server.well else server.state.upper()


def _pools(pools: list[Pool]) -> Iterator[str]:
    names = max(len(pool.name) for pool in pools)
    for pool in pools:
        limit = "no limit" if pool.limit is None else f"{pool.limit} at a time"
        runs = f"{pool.running} running, {pool.waiting} waiting"
        yield f"  {pool.name:<{names}}  {limit:<12}  {runs:<24}  {_served(pool)}"


def _served(pool: Pool) -> str:
    by = f"served by {', '.join(pool.workers)}" if pool.workers else "no worker"
    if pool.stuck:
        why = "PAUSED" if pool.paused else "LIMIT 0" if pool.limit == 0 else "NO WORKER"
        return f"{why}: its runs wait for ever"
    return f"paused, {by}" if pool.paused else by


def _next(found: Standing, now: datetime) -> Iterator[str]:
    for each in found.schedules[:_FIRST]:
        yield f"  {_when(each, now):<36}  {each.deployment}"
    more = max(0, len(found.schedules) - _FIRST) + found.more_schedules
    if more:
        yield f"  and {more} more deployments with schedules"
    if any(each.at is None for each in found.schedules):
        yield "  without a plan nothing starts: the server's scheduler fails (below, or in its log), or the"
        yield "  schedule has no date in the next 100 days"


def _when(run: Next, now: datetime) -> str:
    if run.at is None:
        return "NOT PLANNED"
    return f"{run.at.astimezone():%a %d %b %H:%M %Z} (in {_distance(run.at - now)})"


def _distance(ahead: timedelta) -> str:
    """`40 s`, `12 min`, `6 h 20 min`, `3 days`."""
    seconds = max(0, round(ahead.total_seconds()))
    minutes, hours = seconds // 60, seconds // 3600
    if minutes < 2:
        return f"{seconds} s"
    if hours < 48:
        return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"
    return f"{hours // 24} days"


def _failed(failed: list[Failure], found: Standing) -> Iterator[str]:
    if not found.log:
        yield "errors of the server's services: in its own log, where it runs"
        return
    if not failed:
        yield f"errors of the Prefect server's services: none in {found.log}"
        return
    yield f"errors of the Prefect server's services, in {found.log}"
    for each in failed:
        often = f", {each.times} times" if each.times > 1 else ""
        yield _cut(f"  {each.when}  {each.service}{often} (line {each.line})")
        yield _cut(f"      {each.reason}")
        if each.passing:
            yield "      (another process held SQLite's lock; the service works again when it is next due)"


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"
