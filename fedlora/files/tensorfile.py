"""Tensors as safetensors bytes and files, the only form in which weights are stored and sent (never a pickle)."""

from __future__ import annotations

import os
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedlora.errors import AdapterError
from fedlora.files.atomic import stamp, stamped
from fedlora.files.limits import OWN, UPLOAD, Limits, clean
from fedlora.files.tensorheader import read_header

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


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


def _fill(file: FileIO, room: memoryview) -> None:
    """Read until there is no room left.

    Raises:
        OSError: the file ends before.
    """
    while len(room):
        count = file.readinto(room)
        if not count:
            raise OSError("it ends before its last tensor")
        room = room[count:]


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for; nothing is kept, and no file stays open.

    Raises:
        AdapterError: missing, truncated, not a safetensors file, or beyond the limits, such as tensors of a type that
            holds no real numbers.
    """

    def __init__(self, path: Path, limits: Limits = UPLOAD) -> None:
        self.path = path
        self._state = stamp(path)
        self._header = read_header(path, limits)
        self.shapes = {name: tensor.shape for name, tensor in self._header.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in self._header.items()}

    def layout(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and type of every tensor: all that the size of the file depends on."""
        return [(name, shape, self.dtypes[name]) for name, shape in self.shapes.items()]

    def items(self) -> ItemsView[str, Tensor]:
        """All tensors, with the file opened once."""
        return dict(zip(self.shapes, self.read(list(self.shapes)), strict=True)).items()

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors one after the other, with the file opened once and one of them in memory at a time."""
        yield from zip(self.shapes, self._values(self.shapes), strict=True)

    def read(self, names: Sequence[str]) -> list[Tensor]:
        """Several tensors, with the file opened once."""
        return list(self._values(names))

    def _values(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Tensors by their places in the header, which is not read again: with thousands of clients a module is two
        small tensors in each of thousands of files.

        Raises:
            AdapterError: the file cannot be read, or has changed since.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                if stamped(os.fstat(file.fileno())) != self._state:
                    raise OSError("it has changed since it was opened")
                for name in names:
                    dtype, shape, begin = self._header[name]
                    tensor = torch.empty(shape, dtype=_TYPES[dtype])
                    file.seek(begin)
                    _fill(file, tensor.view(-1).view(torch.uint8).numpy().data)
                    yield tensor
        except OSError as error:
            raise _unreadable(self.path, error) from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self.read([name])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
