"""How an answer is judged: a file for each scorer; third parties add theirs by the entry-point group
`fedlora.scorers`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from fedlora.data.questions import Reference
from fedlora.errors import ConfigError, did_you_mean
from fedlora.objective.scorers.base import Scorer, check

__all__ = ["Reference", "Scorer", "check", "find", "names"]

GROUP = "fedlora.scorers"

_BUILTIN = {
    "exact": "fedlora.objective.scorers.exact:Exact",
    "numeric": "fedlora.objective.scorers.numeric:Numeric",
    "choice": "fedlora.objective.scorers.choice:Choice",
    "choice-normalised": "fedlora.objective.scorers.choice:ChoiceNormalised",
    "rouge-l": "fedlora.objective.scorers.rouge_l:RougeL",
    "code": "fedlora.objective.scorers.code:Code",
}


@cache
def _locations() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=GROUP)} | _BUILTIN


def names() -> list[str]:
    """All scorers, our own first."""
    return list(_BUILTIN) + sorted(set(_locations()) - set(_BUILTIN))


def find(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        ConfigError: there is none, a library that it needs is missing, or its plug-in cannot be loaded.
    """
    key = f"evaluation.generate.scorers={name}"
    if name not in _locations():
        hint = did_you_mean(name, names())
        raise ConfigError(f"{key}: no such scorer.{hint} There are: {', '.join(names())}")
    module, _, attribute = _locations()[name].partition(":")
    try:
        found: Any = getattr(import_module(module), attribute)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{key} comes from a plug-in that cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Scorer) and getattr(found, "name", None) == name):
        raise ConfigError(f"{key} comes from a plug-in whose entry point is {found!r}; expected a Scorer of that name")
    return found()
