"""Tensors as safetensors bytes and files, the only form in which weights are stored and sent (never a pickle)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save
from torch import Tensor

from fedlora.errors import AdapterError


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors as safetensors bytes, the form in which they are stored and sent; equal ones that share memory are kept
    apart."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = (tensor.clone() if place in seen else tensor).contiguous()
        seen.add(place)
    content: bytes = save(apart, metadata=dict(metadata or {}))
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file (never a pickle).

    Raises:
        AdapterError: missing, truncated, or not a safetensors file.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read as safetensors: {error}") from None
    return tensors
