"""A client's upload as it arrives: its header is compared with what is expected before any of its tensors is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fedlora.adapter.weights import Adapter, check_finite, check_shapes
from fedlora.files.limits import UPLOAD, Limits
from fedlora.files.tensorfile import StoredTensors

SENT = frozenset({"F32"})
"""Adapters and heads are sent in fp32."""


def inspect(
    path: Path,
    like: Adapter,
    who: str,
    dtypes: frozenset[str] = SENT,
    limits: Limits = UPLOAD,
    in_memory: bool = True,
) -> Adapter:
    """The adapter in a client's file, if it is one like that which the client was sent.

    First the header alone is looked at: its size, the names, types and shapes of the tensors, where a module may be of
    a lower rank than in `like`. Only then are the tensors read, once, and their values looked at.

    Args:
        path: the safetensors file.
        like: what the client was sent: its modules and their kinds, head, magnitudes and cores.
        who: whose file it is, for the message.
        dtypes: the types in which it may be, as safetensors names them.
        limits: the largest header, and the largest file.
        in_memory: keep what was read; otherwise the adapter lives in its file (`Adapter.stored`).

    Raises:
        AdapterError: names `who` and the tensor: one that is missing, not expected, of another shape or type, or with
            values that are not finite; or names the file: not readable, not safetensors, beyond the limits.
    """
    stored = StoredTensors(path, replace(limits, dtypes=dtypes))
    check_shapes(stored.shapes, like.shapes(), who, lower_rank=True)
    kept: dict[str, Tensor] = {}
    for name, tensor in stored.each():
        check_finite(name, tensor, who)
        if in_memory:
            kept[name] = tensor
    return Adapter.from_tensors(kept) if in_memory else Adapter.stored(stored)
