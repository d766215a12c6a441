"""Whether a causal language model keeps examples apart that are packed into one row, told by what it makes of some."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedlora.data.batches import Batch, pad
from fedlora.data.packing import pack
from fedlora.data.tokens import Examples, Padding
from fedlora.data.turns import IGNORED

if TYPE_CHECKING:
    from fedlora.model.writing import Writer

_LENGTHS = (5, 3, 4, 2)
"""Tokens of the examples: packed, one row holds two of them, and one is filled up."""
_SMALL = 0.3
"""Of the difference that seeing each other makes: far above rounding in half precision."""


def keeps_apart(model: Writer) -> bool:
    """Whether packed examples are predicted as each is alone, and not as one text."""
    lengths = np.array(_LENGTHS, dtype=np.int64)
    tokens = np.split(np.arange(3, 3 + lengths.sum(), dtype=np.int32), np.cumsum(lengths)[:-1])
    examples = Examples(tokens, None, np.zeros(len(tokens), dtype=np.int64), lengths, tokens)
    rows, padding = np.arange(len(tokens)), Padding(0)
    packed = pack(examples, rows, padding)
    as_one = replace(packed, position_ids=torch.arange(packed.input_ids.shape[1]).expand_as(packed.input_ids))
    model.peft.eval()
    try:
        with torch.inference_mode(), model.autocast():
            alone, apart, together = (_said(model, each) for each in (pad(examples, rows, padding), packed, as_one))
    except (TypeError, ValueError):  # it takes no positions
        return False
    return float((apart - alone).norm()) <= _SMALL * float((together - alone).norm())


def _said(model: Writer, batch: Batch) -> Tensor:
    """Logits (tokens × vocabulary) by which the tokens are predicted, in the order of the tokens' ids."""
    there = batch.labels[:, 1:] != IGNORED
    logits = model.peft(**batch.to(model.device).model_inputs()).logits.float().cpu()[:, :-1][there]
    ordered: Tensor = logits[batch.labels[:, 1:][there].argsort()]
    return ordered
