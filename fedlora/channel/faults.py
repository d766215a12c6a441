"""What becomes of a client and its update on the way, where the configuration asks for faults (`channel.faults`).

Nothing is waited for and no process is killed: fates are drawn by (seed, round, client, attempt) before a client
trains, so that they are the same under every runner, for every strategy and after every interruption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from fedlora import seeds
from fedlora.adapter import Adapter, Factors
from fedlora.config import RunConfig
from fedlora.config.channel import Damage
from fedlora.seeds import Turn
from fedlora.strategies import registry

_BLOW_UP = 1e6


@dataclass(frozen=True)
class Fate:
    """What happens to a client in one attempt."""

    crashes: bool = False
    delay_s: float = 0.0
    """Virtual seconds until its update arrives."""
    damage: Damage | None = None
    place: float = 0.0
    """Who comes first among those that arrive together."""

    def arrives(self, deadline_s: float | None) -> bool:
        """Whether its update is there in time."""
        return not self.crashes and (deadline_s is None or self.delay_s <= deadline_s)


@dataclass(frozen=True)
class Message:
    """An update as it is sent: its tensors, what it says of itself, and what a channel may do to its file."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    on_the_way: Callable[[bytes], bytes] = bytes


def fate(config: RunConfig, turn: Turn) -> Fate:
    """The fate of a client; none, good or bad, where one client trains on everybody's data (a control)."""
    if registry.find(config.strategy).traits.pools_data:
        return Fate()
    faults = config.channel.faults
    draw = seeds.numpy_generator(turn.seed, f"faults/{turn.attempt}", turn.round, turn.client)
    crash, corrupt, place = draw.random(3)
    unit, kind = draw.standard_normal(), faults.kinds[draw.integers(len(faults.kinds))]
    delay = {
        "none": 0.0,
        "exponential": -np.log1p(-draw.random()) * faults.delay_s,
        "lognormal": np.exp(unit) * faults.delay_s,
    }[faults.delay]
    return Fate(crash < faults.crash, float(delay), kind if corrupt < faults.corrupt else None, float(place))


def ticket(turn: Turn) -> str:
    """What the server gives a client that it asks, and wants back with the update: another one is a replay."""
    return f"{seeds.key(turn.seed, f'ticket/{turn.attempt}', turn.round, turn.client):016x}"


def damaged(message: Message, kind: Damage, start: Adapter, turn: Turn) -> Message:
    """The message after a damage of this kind.

    Args:
        message: as the client sent it.
        kind: of damage.
        start: what the client was sent.
        turn: whose message it is.
    """
    if kind == "stale-round":
        return replace(message, record={**message.record, "round": turn.round - 1})
    if kind == "replay":
        earlier = replace(turn, round=turn.round - 1)
        return replace(message, record={**message.record, "ticket": ticket(earlier)})
    if kind == "truncated":
        return replace(message, on_the_way=lambda content: content[: len(content) // 2])
    if kind == "bit-flip":
        return replace(message, on_the_way=_flipped)
    upload = Adapter.from_tensors(message.tensors)
    return replace(message, tensors=_SPOILT[kind](upload, start).tensors())


def _flipped(content: bytes) -> bytes:
    """One bit in the middle, among the values."""
    spoilt = bytearray(content)
    spoilt[len(spoilt) // 2] ^= 1
    return bytes(spoilt)


def _first(upload: Adapter) -> tuple[str, Factors]:
    module = upload.modules[0]
    return module, upload.factors[module]


def _with(upload: Adapter, module: str, pair: Factors) -> Adapter:
    return upload.with_factors({**upload.factors, module: pair})


def _not_finite(upload: Adapter, start: Adapter) -> Adapter:
    module, pair = _first(upload)
    spoilt = pair.B.clone()
    spoilt[0, 0] = float("nan")
    return _with(upload, module, Factors(spoilt, pair.A))


def _narrow(upload: Adapter, start: Adapter) -> Adapter:
    module, pair = _first(upload)
    return _with(upload, module, Factors(pair.B, pair.A[:, :-1]))


def _high(upload: Adapter, start: Adapter) -> Adapter:
    module, pair = _first(upload)
    return _with(upload, module, pair.at_rank(start.factors[module].rank + 1))


def _without(upload: Adapter, start: Adapter) -> Adapter:
    return upload.with_factors({name: pair for name, pair in upload.factors.items() if name != upload.modules[0]})


def _beside(upload: Adapter, start: Adapter) -> Adapter:
    return _with(upload, "module_of_nobody", _first(upload)[1])


def _blown_up(upload: Adapter, start: Adapter) -> Adapter:
    like = start.cut_like(upload)
    grown = {}
    for module, pair in upload.factors.items():
        origin = like.factors[module]
        grown[module] = Factors(origin.B + _BLOW_UP * (pair.B - origin.B), origin.A + _BLOW_UP * (pair.A - origin.A))
    return upload.with_factors(grown)


_SPOILT: dict[str, Callable[[Adapter, Adapter], Adapter]] = {
    "nan": _not_finite,
    "shape": _narrow,
    "rank": _high,
    "missing-module": _without,
    "extra-module": _beside,
    "norm": _blown_up,
}
"""Damage to the tensors: of the upload and what the client was sent, the upload as it arrives."""
