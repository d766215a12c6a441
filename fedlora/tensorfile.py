"""Tensors as safetensors bytes and files, the only form in which weights are stored and sent (never a pickle)."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors
from safetensors import safe_open
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
        raise AdapterError(f"{path} cannot be read as safetensors: {_reason(error)}") from None
    return tensors


def _reason(error: Exception) -> str:
    """One line, whatever a file's header made the message quote."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return line if len(line) <= 300 else f"{line[:300]} …"


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for; nothing is kept, and no file stays open.

    Raises:
        AdapterError: missing, truncated, not a safetensors file, or tensors of a type that holds no real numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                self.dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        except (OSError, safetensors.SafetensorError) as error:
            raise AdapterError(f"{path} cannot be read as safetensors: {_reason(error)}") from None
        for name, dtype in self.dtypes.items():
            if not name.isprintable():
                raise AdapterError(f"{path}: tensor {name!a} has a name that cannot be printed")
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise AdapterError(f"{path}: tensor '{name}' is of type {dtype}; expected F32, F16, BF16 or F64")

    def layout(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and type of every tensor: all that the size of the file depends on."""
        return [(name, shape, self.dtypes[name]) for name, shape in self.shapes.items()]

    def items(self) -> ItemsView[str, Tensor]:
        """All tensors, with the file opened once."""
        return dict(zip(self.shapes, self.read(list(self.shapes)), strict=True)).items()

    def read(self, names: Sequence[str]) -> list[Tensor]:
        """Several tensors, with the file opened once."""
        try:
            with safe_open(self.path, framework="pt") as file:
                return [file.get_tensor(name) for name in names]
        except (OSError, safetensors.SafetensorError) as error:
            raise AdapterError(f"{self.path} cannot be read as safetensors: {_reason(error)}") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self.read([name])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
