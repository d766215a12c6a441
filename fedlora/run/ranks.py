"""Which client trains at which rank: given, dealt by share, or by what clients show in round one (arXiv 2406.17477)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedlora import seeds
from fedlora.config.lora import LoraConfig, RankRule
from fedlora.data.apportion import largest_remainder

_HELD_OUT = 0.1


def at_start(lora: LoraConfig, clients: int, seed: int) -> dict[int, int]:
    """The rank of every client in round one; empty where all have the same."""
    if lora.ranks is None:
        return {}
    if isinstance(lora.ranks, RankRule):
        return dict.fromkeys(range(clients), lora.ranks.low)
    if isinstance(lora.ranks, list):
        return dict(enumerate(lora.ranks))
    ranks = sorted(lora.ranks)
    counts = largest_remainder(clients, [lora.ranks[rank] for rank in ranks])
    dealt = np.repeat(ranks, counts)
    return dict(enumerate(seeds.numpy_generator(seed, "ranks").permutation(dealt).tolist()))


def after_round(lora: LoraConfig, number: int, losses: Mapping[int, float], clients: int) -> dict[int, int]:
    """The ranks that change after round `number`, by the clients' losses on what they held out; mostly none.

    Under a rule, after round one, the `share` of all `clients` with the lowest losses rise (at least one).
    """
    if not isinstance(lora.ranks, RankRule) or number != 1:
        return {}
    best = sorted(losses, key=lambda client: (losses[client], client))
    return dict.fromkeys(best[: max(1, round(lora.ranks.share * clients))], lora.ranks.high)


def hold_out(lora: LoraConfig, number: int, rows: np.ndarray, seed: int, client: int) -> tuple[np.ndarray, np.ndarray]:
    """A client's examples to train on and to validate on: a tenth is held out in round one under a rule, else none."""
    if not isinstance(lora.ranks, RankRule) or number != 1 or len(rows) < 2:
        return rows, rows[:0]
    order = seeds.numpy_generator(seed, "hold-out", number, client).permutation(len(rows))
    held = max(1, round(_HELD_OUT * len(rows)))
    return np.sort(rows[order[held:]]), np.sort(rows[order[:held]])
