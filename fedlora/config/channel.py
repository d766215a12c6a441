"""The part of a configuration that says what is asked of the clients' updates, and which faults are made on purpose."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fedlora.sections import Section, words

Damage = Literal[
    "nan",
    "shape",
    "rank",
    "missing-module",
    "extra-module",
    "norm",
    "stale-round",
    "replay",
    "truncated",
    "bit-flip",
]


class FaultsConfig(Section):
    """Faults made on purpose, to compare strategies under them; each drawn by (seed, round, client)."""

    crash: float = Field(0.0, ge=0, le=1)
    """Probability that a client drops out of a round: it receives the broadcast and sends nothing back."""
    delay: Literal["none", "exponential", "lognormal"] = "none"
    """Distribution of the time until a client's update arrives. Nobody waits for it: seconds are virtual."""
    delay_s: float = Field(10.0, gt=0)
    """Mean of `exponential`, median of `lognormal` (whose logarithm has a standard deviation of one), in virtual
    seconds."""
    corrupt: float = Field(0.0, ge=0, le=1)
    """Probability that an update is damaged before it arrives."""
    kinds: Annotated[list[Damage], BeforeValidator(words)] = Field(
        ["nan", "shape", "rank", "missing-module", "extra-module", "stale-round", "replay", "truncated", "bit-flip"],
        min_length=1,
    )
    """What damage to draw from. `norm` multiplies the client's change by a million, which only `channel.max_norm` can
    tell from an honest one, so it is not among them unless asked for."""


class ChannelConfig(Section):
    """What is asked of the clients' updates, and what happens when some do not come or are refused."""

    min_clients: int = Field(1, ge=1)
    """Fewest clients whose updates make a round."""
    too_few: Literal["repeat", "stop"] = "repeat"
    """With fewer: ask other clients in place of those that failed (and, where there are no others, these again), or
    stop the run."""
    attempts: int = Field(3, ge=1)
    """How often clients are asked in one round at most, the first time included."""
    over_selection: float = Field(0.0, ge=0)
    """Ask this share of clients more than a round needs, and take the first to arrive. Needs `fraction` below one."""
    deadline_s: float | None = Field(None, gt=0)
    """Updates that arrive later, in virtual seconds (`channel.faults.delay`), are left out. Empty: wait for all."""
    max_norm: float | None = Field(None, gt=0)
    """Refuse an update whose change to adapter and head has a larger L2 norm. Empty: no bound."""
    faults: FaultsConfig = FaultsConfig()
