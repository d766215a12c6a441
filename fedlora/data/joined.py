"""Batches of several clients as one: what a shared forward pass is given.

A client's own batch stays as it is, the padding on its side included, so that every token keeps its position and its
mask. What is added stands behind it: columns of padding up to the longest batch, and rows up to the largest, which
repeat one of its own and count for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedlora.data.batches import Batch
from fedlora.data.tokens import Padding
from fedlora.data.turns import IGNORED


@dataclass(frozen=True)
class Joined:
    """One batch of each of several clients as one batch of (clients · rows) × tokens, client after client."""

    batch: Batch
    own: tuple[tuple[int, int], ...]
    """Rows and tokens of each client's own batch, at the beginning of its rows; no rows where it has none."""

    @property
    def rows(self) -> int:
        """Rows that each client has in the batch."""
        return len(self.batch) // len(self.own)

    @property
    def tokens(self) -> int:
        """Columns of the batch."""
        return int(self.batch.input_ids.shape[1])

    def shares(self, units: Sequence[int]) -> Tensor:
        """What each row counts in its client's mean over so many units (clients × rows, fp64): nothing where it is a
        repeated one."""
        shares = torch.zeros(len(self.own), self.rows, dtype=torch.float64)
        for client, (rows, _) in enumerate(self.own):
            shares[client, :rows] = 1 / units[client]
        return shares


def join(batches: Sequence[Batch | None], padding: Padding) -> Joined:
    """The batches of several clients as one; None for a client that has none, while others still do.

    Args:
        batches: one of each client, on the CPU.
        padding: of the tokenizer.
    """
    there = [batch for batch in batches if batch is not None]
    rows, tokens = max(map(len, there)), max(batch.input_ids.shape[1] for batch in there)
    own = tuple((0, 0) if batch is None else (len(batch), batch.input_ids.shape[1]) for batch in batches)
    filled = [vars(_filled(batch or there[0], rows, tokens, padding)) for batch in batches]
    held = (name for name, values in filled[0].items() if values is not None)
    return Joined(replace(there[0], **{name: torch.cat([each[name] for each in filled]) for name in held}), own)


def _filled(batch: Batch, rows: int, tokens: int, padding: Padding) -> Batch:
    """A batch of so many rows and tokens. Packed rows have no mask: what is behind them is a stretch of its own."""
    more, missing = tokens - batch.input_ids.shape[1], rows - len(batch)
    packed, types, positions = batch.position_ids is not None, batch.token_type_ids, batch.position_ids

    def tall(values: Tensor) -> Tensor:
        return torch.cat([values, values[:1].expand(missing, *values.shape[1:])])

    def filled(values: Tensor, empty: int) -> Tensor:
        return tall(nn.functional.pad(values, (0, more), value=empty))

    if batch.labels.ndim == 1:
        labels = tall(batch.labels)
    else:
        labels = nn.functional.pad(batch.labels, (0, more, 0, missing), value=IGNORED)
    if positions is not None:
        positions = tall(torch.cat([positions, torch.arange(more).expand(len(batch), more)], dim=1))
    return Batch(
        filled(batch.input_ids, padding.token),
        filled(batch.attention_mask, int(packed)),
        None if types is None else filled(types, 0),
        labels,
        positions,
    )
