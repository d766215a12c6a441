"""Tensors as safetensors bytes and files, the only form in which weights are stored and sent (never a pickle)."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fedlora.errors import AdapterError
from fedlora.files.limits import OWN, UPLOAD, Limits, clean
from fedlora.files.tensorheader import read_header


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


def read_tensors(path: Path, limits: Limits = OWN) -> dict[str, Tensor]:
    """All tensors of a safetensors file (never a pickle).

    Args:
        path: the file.
        limits: what it may hold; wide, for a file that this installation wrote, or `UPLOAD` for one from anyone.

    Raises:
        AdapterError: missing, truncated, not a safetensors file, or beyond the limits; before a tensor is read.
    """
    read_header(path, limits)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, error) from None
    return tensors


def _unreadable(path: Path, error: Exception) -> AdapterError:
    """One line, whatever a file's header made the message quote."""
    return AdapterError(f"{path} cannot be read as safetensors: {clean(str(error))}")


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for; nothing is kept, and no file stays open.

    Raises:
        AdapterError: missing, truncated, not a safetensors file, or beyond the limits, such as tensors of a type that
            holds no real numbers.
    """

    def __init__(self, path: Path, limits: Limits = UPLOAD) -> None:
        self.path = path
        header = read_header(path, limits)
        self.shapes = {name: tensor.shape for name, tensor in header.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in header.items()}

    def layout(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and type of every tensor: all that the size of the file depends on."""
        return [(name, shape, self.dtypes[name]) for name, shape in self.shapes.items()]

    def items(self) -> ItemsView[str, Tensor]:
        """All tensors, with the file opened once."""
        return dict(zip(self.shapes, self.read(list(self.shapes)), strict=True)).items()

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors one after the other, with the file opened once and one of them in memory at a time."""
        try:
            with safe_open(self.path, framework="pt") as file:
                for name in self.shapes:
                    yield name, file.get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise _unreadable(self.path, error) from None

    def read(self, names: Sequence[str]) -> list[Tensor]:
        """Several tensors, with the file opened once."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return [file.get_tensor(name) for name in names]
        except (OSError, safetensors.SafetensorError) as error:
            raise _unreadable(self.path, error) from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self.read([name])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
