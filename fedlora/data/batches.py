"""Batches of texts of similar length, padded no further than their longest text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedlora.data.tokens import Examples, Padding
from fedlora.data.turns import IGNORED
from fedlora.errors import DataError

_WINDOW = 8
"""Batches that are sorted by length together: enough to save most padding, few enough to keep the order random."""


@dataclass(frozen=True)
class Batch:
    """Tensors of shape batch × tokens (`labels`: batch, or of dialogues batch × tokens), all int64, but labels that are
    numbers to learn float32."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor | None
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None
    """Where a row holds several examples (`fedlora.data.packing`): those of each begin at 0."""
    ahead: torch.Tensor | None = None
    """Of dialogues on a device: `places`, found before they were sent there, so that nobody waits for a GPU."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        held = {**vars(self), "ahead": None if self.labels.ndim == 1 else self.places()}
        tensors = {name: values for name, values in held.items() if isinstance(values, torch.Tensor)}
        return replace(self, **{name: on_device(values, device) for name, values in tensors.items()})

    def following(self) -> torch.Tensor:
        """Of dialogues, the token that is to be predicted at each place (of batch × tokens, flat); `IGNORED` where none
        is."""
        return torch.nn.functional.pad(self.labels[:, 1:], (0, 1), value=IGNORED).flatten()

    def places(self) -> torch.Tensor:
        """Of dialogues, where (places of batch × tokens, flat) a token is to be predicted."""
        return (self.following() != IGNORED).nonzero().squeeze(1) if self.ahead is None else self.ahead

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a model's forward pass, without the labels."""
        if self.position_ids is not None:  # with a mask or a cache, nobody would look at where positions begin anew
            return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids
        return inputs


def on_device(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Values on a device. A GPU is sent them from memory that it reads by itself, so that nobody waits for it."""
    return (
        values.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else values.to(device)
    )


def steps_for(examples_count: int, batch_size: int, local_steps: int | None, local_epochs: float | None) -> int:
    """Optimiser steps of one client in one round: as many as said, or those of that many passes, at least one."""
    if local_steps is not None:
        return local_steps
    if local_epochs is None:
        raise ValueError("one of local_steps and local_epochs must be given")
    batches_per_pass = math.ceil(examples_count / batch_size)
    return max(1, math.ceil(round(local_epochs * batches_per_pass, 6)))


def training_rows(
    examples: Examples, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """The rows of exactly `steps` batches from endless passes, each in a new random order; every pass has every example
    once.

    A client with fewer examples than `batch_size` gives batches of what it has.

    Raises:
        DataError: there are no examples.
    """
    if not len(examples):
        raise DataError("there are no examples to train on; lower clients, or raise partition.min_size")
    done = 0
    while done < steps:
        for rows in _one_pass(examples.lengths, batch_size, generator):
            if done == steps:
                return
            done += 1
            yield rows


def parts_of(rows: npt.NDArray[np.int64], batch_size: int) -> list[npt.NDArray[np.int64]]:
    """The rows of a step in pieces of at most `batch_size`."""
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def evaluation_batches(examples: Examples, batch_size: int, padding: Padding) -> Iterator[Batch]:
    """Every example exactly once, in the order of length: no draw, the same batches every time."""
    order = np.argsort(examples.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield pad(examples, order[start : start + batch_size], padding)


def pad(examples: Examples, rows: npt.NDArray[np.int64], padding: Padding) -> Batch:
    """The examples at `rows` as one batch, padded to the longest of them on the side that the tokenizer names."""
    lengths = examples.lengths[rows]
    positions = np.arange(lengths.max())
    edge = lengths[:, None]
    filled = positions < edge if padding.side == "right" else positions >= len(positions) - edge
    types, targets = examples.token_type_ids, examples.targets
    known = examples.labels if examples.values is None else examples.values
    return Batch(
        _fill(examples.input_ids, rows, filled, padding.token),
        torch.from_numpy(filled.astype(np.int64)),
        None if types is None else _fill(types, rows, filled, 0),
        torch.from_numpy(known[rows]) if targets is None else _fill(targets, rows, filled, IGNORED),
    )


def _fill(
    ragged: list[npt.NDArray[np.int32]], rows: npt.NDArray[np.int64], filled: npt.NDArray[np.bool_], empty: int
) -> torch.Tensor:
    block = np.full(filled.shape, empty, dtype=np.int64)
    block[filled] = np.concatenate([ragged[row] for row in rows])
    return torch.from_numpy(block)


def _one_pass(
    lengths: npt.NDArray[np.int64], batch_size: int, generator: torch.Generator
) -> list[npt.NDArray[np.int64]]:
    """Rows of each batch of one pass; the short batch, if any, is among them."""
    order = torch.randperm(len(lengths), generator=generator).numpy()
    batches = []
    for start in range(0, len(order), _WINDOW * batch_size):
        window = order[start : start + _WINDOW * batch_size]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += [window[cut : cut + batch_size] for cut in range(0, len(window), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
