"""Which of the settings that vary are the world's, and which the user's: conditions and choices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedlora.config.run import NEUTRAL

CHOSEN = ("strategy", "strategy_options", "lora", "training", "rounds", "weighting")
"""Settings, or sections of them, that a user chooses. Everything else that varies is a condition: data, partition,
clients, faults, the network. A seed is neither: it is the draw over which both are averaged."""


def within(key: str, names: Iterable[str]) -> bool:
    """Whether a dotted key is one of the names, or lies in one of the sections."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def last_parts(keys: Iterable[str]) -> dict[str, str]:
    """Dotted keys without their sections (`alpha` for `partition.alpha`, but `data` for `data.name`), where no other of
    them would be called alike."""
    ends = {key: key.removesuffix(".name").rpartition(".")[2] for key in keys}
    every = list(ends.values())
    return {key: end if every.count(end) == 1 else key for key, end in ends.items()}


def shortly(values: Mapping[str, object]) -> str:
    """`rank=4 data=reviews.csv`: settings in few words, keys without their sections and paths without their folders."""
    names = last_parts(values)
    return " ".join(f"{names[key]}={str(value).rpartition('/')[2] or value}" for key, value in values.items())


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

    def is_condition(self, key: str) -> bool:
        """Whether a key tells conditions apart: neither chosen, nor the seed, nor without effect on numbers."""
        return not (self.is_choice(key) or key in ("seed", *NEUTRAL) or key.startswith("tracking."))

    def short(self, values: Mapping[str, object]) -> str:
        """`svd rank=4 alpha=0.1 s1`: the strategy, what else was chosen, the condition, the seed; keys without their
        sections. What tells a run from its neighbours comes last, and all of it fits into a narrow column."""
        others = [key for key in values if key not in ("strategy", "seed")]
        others.sort(key=lambda key: not self.is_choice(key))
        seed = f"s{values['seed']}" if "seed" in values else ""
        return " ".join(filter(None, (str(values["strategy"]), shortly({key: values[key] for key in others}), seed)))
