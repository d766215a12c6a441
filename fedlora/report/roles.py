"""Which of the settings that vary are the world's, and which the user's: conditions and choices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

CHOSEN = ("strategy", "strategy_options", "lora", "training", "rounds", "weighting")
"""Settings, or sections of them, that a user chooses. Everything else that varies is a condition: data, partition,
clients, faults, the network. A seed is neither: it is the draw over which both are averaged."""


def within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of the names, or lies in one of the sections."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


@dataclass(frozen=True)
class Roles:
    """What each key of a comparison is: by default (`CHOSEN`), or as a sweep's `compare` says."""

    choices: tuple[str, ...] = ()
    """Keys or sections that are choices though they would not be by default."""
    conditions: tuple[str, ...] = ()
    """The same for conditions."""

    def is_choice(self, key: str) -> bool:
        """Whether a key is the user's to choose."""
        if within(key, self.conditions):
            return False
        return within(key, self.choices) or within(key, CHOSEN)
