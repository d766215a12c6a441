"""A run's rounds read back from MLflow: the same for runs of this machine and of any other."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fedlora.metrics import FINAL, RoundRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient

_AT_ONCE = 8
"""Requests under way: a history is one request per metric."""


def records(client: MlflowClient, run: Any) -> list[RoundRecord]:
    """The rounds of a run (an MLflow `Run`) that have been logged, in order; who took part is not in MLflow."""
    return next(iter(many(client, [run]).values()))


def many(client: MlflowClient, runs: Iterable[Any]) -> dict[str, list[RoundRecord]]:
    """The rounds of several runs, by run id."""
    wanted = list(runs)
    pairs = [(run.info.run_id, name) for run in wanted for name in run.data.metrics if not name.startswith(FINAL)]
    found: dict[str, dict[int, tuple[int, dict[str, float]]]] = {run.info.run_id: {} for run in wanted}
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for (run_id, name), points in zip(
            pairs, threads.map(lambda p: client.get_metric_history(*p), pairs), strict=True
        ):
            for point in points:
                found[run_id].setdefault(point.step, (point.timestamp, {}))[1][name] = point.value
    return {
        run_id: [RoundRecord(number, stamp, (), values) for number, (stamp, values) in sorted(rounds.items())]
        for run_id, rounds in found.items()
    }
