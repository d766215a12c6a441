"""What is learned and how it is scored: a file for each objective, found by its name."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, did_you_mean
from fedlora.objective.base import Loss, Objective, Resident, Score, Scores

__all__ = ["Loss", "Objective", "Resident", "Score", "Scores", "find", "names", "score_of", "scores_of"]


def names() -> list[str]:
    """The objectives that there are: what `task` may be."""
    files = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return sorted(name for name in files if name != "base")


def find(task: str) -> Objective:
    """The objective of that name.

    Raises:
        ConfigError: there is none.
    """
    if task not in names():
        hint = did_you_mean(task, names())
        raise ConfigError(f"task={task}: no such objective.{hint} There are: {', '.join(names())}")
    found: Objective = import_module(f"{__name__}.{task}").OBJECTIVE
    return found


def score_of(config: RunConfig) -> Score:
    """The score that decides in runs of this configuration.

    Raises:
        ConfigError: there is no such task.
    """
    return find(config.task).score_of(config)


def scores_of(config: RunConfig) -> tuple[Score, ...]:
    """Those scores that tables show of runs of this configuration: the deciding one, then the others.

    Raises:
        ConfigError: there is no such task.
    """
    return find(config.task).scores_of(config)
