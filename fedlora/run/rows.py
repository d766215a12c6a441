"""The rows that a round adds to a run's tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedlora.metrics import Bytes
from fedlora.run.participation import Entry, Roll
from fedlora.run.runfolder import RunFolder
from fedlora.training.evaluation import Scores

_DIVERGENCE = ("rho", "floor", "excess", "effective_clients", "R", "P", "Q", "dispersion")


def of_divergence(number: int, divergence: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per module: ρ, floor, excess, effective clients, R, P, Q."""
    return [
        {"round": number, "module": module, **{name: values[name] for name in _DIVERGENCE}}
        for module, values in divergence.items()
    ]


def of_clients(run: RunFolder, number: int, roll: Roll) -> list[dict[str, Any]]:
    """A row per client that was asked: examples, rank, first and last loss, local accuracy, seconds, bytes, what became
    of it and why."""
    return [_of_client(run, number, entry) for entry in roll.entries]


def _of_client(run: RunFolder, number: int, entry: Entry) -> dict[str, Any]:
    known = run.need_json(f"{run.client_stem(number, entry.client)}.json") if entry.status == "completed" else {}
    losses, scores = known.get("losses"), Scores.from_json(known["local"]) if known.get("local") else None
    sent = Bytes(**(known.get("bytes") or entry.bytes))
    return {
        "round": number,
        "client": entry.client,
        "examples": known.get("examples"),
        "rank": known.get("rank"),
        "loss_first": losses[0] if losses else None,
        "loss": float(np.mean(losses[-5:])) if losses else None,
        "accuracy": scores.accuracy if scores and scores.examples else None,
        "seconds": known.get("seconds"),
        "bytes": sent.total,
        "bytes_up": sent.up_adapter + sent.up_head,
        "bytes_down": sent.down_adapter + sent.down_head + sent.down_base,
        "status": entry.status,
        "reason": entry.reason,
        "attempt": entry.attempt + 1,
        "delay_s": entry.delay_s,
    }
