"""What a run in MLflow has learned and what it is judged by: as the configuration says that is logged with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedlora import objective
from fedlora.config import RunConfig
from fedlora.config.recalled import recalled
from fedlora.errors import ConfigError, FedloraError, counted
from fedlora.objective import Score


@dataclass(frozen=True)
class Judged:
    """A task, and its scores: the one that decides, then others."""

    task: str
    scores: tuple[Score, ...]

    @property
    def criterion(self) -> Score:
        """The score that decides."""
        return self.scores[0]

    @cached_property
    def labelled(self) -> bool:
        """Whether labels are what is learned."""
        return objective.find(self.task).labelled

    @classmethod
    def by(cls, config: RunConfig) -> Judged:
        """Of runs of a configuration.

        Raises:
            ConfigError: there is no such task here.
        """
        return cls(config.task, objective.scores_of(config))


USUAL = str(RunConfig.model_fields["task"].default)
"""The task of runs that were logged before there was another."""


def of(run: Any) -> Judged | None:
    """Of an MLflow run; None where its task is not known here."""
    try:
        return Judged.by(recalled(run.data.params))
    except ConfigError:
        return None


def groups(runs: Iterable[tuple[Any, Judged]]) -> dict[str, list[Any]]:
    """Runs by what can be compared: their task, or `TASK:SCORE` where runs of it are judged by different scores."""
    every = list(runs)
    kinds = dict.fromkeys((judged.task, judged.criterion.name) for _, judged in every)
    tasks = [task for task, _ in kinds]
    called = {kind: kind[0] if tasks.count(kind[0]) == 1 else ":".join(kind) for kind in kinds}
    found: dict[str, list[Any]] = {name: [] for name in called.values()}
    for run, judged in every:
        found[called[judged.task, judged.criterion.name]].append(run)
    return found


def one_kind(found: dict[str, list[Any]], wanted: str | None, title: str) -> Sequence[Any]:
    """The runs of one task: the wanted one, or the only one.

    Args:
        found: as `groups` gives them.
        wanted: one of its keys. None: whatever all are of.
        title: what they are runs of.

    Raises:
        FedloraError: there are several and none is wanted, or none of the wanted.
    """
    if wanted is None and len(found) < 2:
        return next(iter(found.values()), [])
    if wanted in found:
        return found[wanted]
    there = ", ".join(f"{name} ({counted(len(runs), 'run')})" for name, runs in found.items())
    if wanted is None:
        raise FedloraError(
            f"{title} holds runs that no one score compares: {there}; choose one with --task={next(iter(found))}"
        )
    raise FedloraError(f"--task={wanted}: {title} has no finished run of it; there: {there or 'none at all'}")
