"""Several examples in one row, each seeing itself alone: positions begin anew with each, by which attention tells them
apart (`Objective.check_model` asks whether the model's does)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fedlora.data.batches import Batch
from fedlora.data.tokens import Examples, Padding
from fedlora.data.turns import IGNORED
from fedlora.errors import DataError


def pack(examples: Examples, rows: npt.NDArray[np.int64], padding: Padding) -> Batch:
    """The examples at `rows` as one batch of as few rows as their greedy packing takes, none longer than the client's
    longest example. What fills a row up is a stretch of its own, of which nothing is trained.

    Raises:
        DataError: the examples are no dialogues.
    """
    if examples.targets is None:
        raise DataError("training.packing is for dialogues (task=generation), and these examples have labels")
    bins = _bins(rows, examples.lengths)
    shape = (len(bins), max(int(examples.lengths[each].sum()) for each in bins))
    ids, targets = np.full(shape, padding.token, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    for row, members in enumerate(bins):
        start = 0
        for member in members:
            end = start + int(examples.lengths[member])
            ids[row, start:end], targets[row, start:end] = examples.input_ids[member], examples.targets[member]
            targets[row, start] = IGNORED  # it would be predicted by the example before
            positions[row, start:end] = np.arange(end - start)
            start = end
        positions[row, start:] = np.arange(shape[1] - start)
    rest = (torch.from_numpy(each) for each in (targets, positions))
    return Batch(torch.from_numpy(ids), torch.ones(shape, dtype=torch.int64), None, *rest)


def _bins(rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> list[list[int]]:
    """Longest first, each to the first row that has room for it."""
    room: list[int] = []
    bins: list[list[int]] = []
    most = int(lengths.max())
    for member in sorted(rows.tolist(), key=lambda row: (-lengths[row], row)):
        length = int(lengths[member])
        place = next((index for index, left in enumerate(room) if left >= length), len(room))
        if place == len(room):
            room.append(most)
            bins.append([])
        room[place] -= length
        bins[place].append(member)
    return bins
