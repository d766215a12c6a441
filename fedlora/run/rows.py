"""The rows that a round adds to a run's tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedlora.objective import Score
from fedlora.run.participation import Entry, Roll
from fedlora.run.records import ClientRecord

_DIVERGENCE = ("rho", "floor", "excess", "effective_clients", "R", "P", "Q", "dispersion")


def of_divergence(number: int, divergence: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per module: ρ, floor, excess, effective clients, R, P, Q."""
    return [
        {"round": number, "module": module, **{name: values[name] for name in _DIVERGENCE}}
        for module, values in divergence.items()
    ]


def of_clients(number: int, roll: Roll, records: Mapping[int, ClientRecord], score: Score) -> list[dict[str, Any]]:
    """A row per client that was asked: examples, rank, first and last loss, local score, seconds, bytes, what became of
    it and why."""
    return [
        _of_client(number, entry, records[entry.client] if entry.status == "completed" else None, score)
        for entry in roll.entries
    ]


def _of_client(number: int, entry: Entry, known: ClientRecord | None, score: Score) -> dict[str, Any]:
    losses, scores = (known.losses, known.local) if known else (None, None)
    sent = known.bytes if known else entry.bytes
    return {
        "round": number,
        "client": entry.client,
        "examples": known.examples if known else None,
        **({"tokens": known.tokens} if known and known.tokens is not None else {}),
        "rank": known.rank if known else None,
        "loss_first": losses[0] if losses else None,
        "loss": float(np.mean(losses[-5:])) if losses else None,
        score.name: scores.values().get(score.name) if scores and scores.examples else None,
        "seconds": known.seconds if known else None,
        "bytes": sent.total,
        "bytes_up": sent.up_adapter + sent.up_head,
        "bytes_down": sent.down_adapter + sent.down_head + sent.down_base,
        "status": entry.status,
        "reason": entry.reason,
        "attempt": entry.attempt + 1,
        "delay_s": entry.delay_s,
    }
