"""The header of a safetensors file, checked against the file's size before any tensor has memory.

A file is 8 bytes with the length of its header, the header (JSON: type, shape and place of every tensor), and the
values without a gap. The safetensors library checks much of this too, but takes any header up to 100 MB, any number of
tensors, and dimensions of 2⁴⁰ beside one of zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedlora.errors import AdapterError
from fedlora.files.limits import UPLOAD, Limits, check_regular, clean, once, refuse_pointer, short

_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_METADATA = "__metadata__"
_LONGEST_NAME = 500
_MOST_DIMENSIONS = 8
_LARGEST_EMPTY = 2**31
"""A dimension beside one of zero, which the size of the file says nothing about."""


class Stored(NamedTuple):
    """A tensor in a file: its type, as safetensors names it, its shape, and the byte at which its values begin."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


def read_header(path: Path, limits: Limits = UPLOAD) -> dict[str, Stored]:
    """Type and shape of every tensor of a safetensors file, in the order of the header; no tensor is read.

    Raises:
        AdapterError: not a file, not safetensors, or beyond the limits; names the tensor.
    """
    try:
        size = check_regular(path).st_size
        refuse_pointer(path)
        if size > limits.total_bytes:
            raise ValueError(f"its {size} bytes are above the limit of {limits.total_bytes}")
        content, length = _content(path, size, limits)
        tensors = _tensors(content, size, 8 + length)
    except (OSError, ValueError, RecursionError) as error:
        reason = "its header is nested" if isinstance(error, RecursionError) else clean(str(error))
        raise AdapterError(f"{path} cannot be read as safetensors: {reason}") from None
    _check(path, tensors, limits)
    return tensors


def _content(path: Path, size: int, limits: Limits) -> tuple[dict[str, Any], int]:
    """The header's JSON, and its length in bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}; cut off, or not safetensors")
        if length > limits.header_bytes:
            raise ValueError(f"its header of {length} bytes is above the limit of {limits.header_bytes}")
        raw = file.read(length)
    # Counted first: Python's objects take many times the memory of the JSON that they come from.
    most = {b"{": limits.tensors + 2, b"[": 2 * limits.tensors, b'"': 10 * limits.tensors + 10_000}  # some of metadata
    if any(raw.count(sign) > number for sign, number in most.items()):
        raise ValueError(f"its header holds more than the {limits.tensors} tensors that are allowed")
    content = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    if not isinstance(content, dict):
        raise ValueError("its header is no JSON object")
    return content, length


def _tensors(content: Mapping[str, Any], size: int, start: int) -> dict[str, Stored]:
    """The entries, when they are well-formed and fill the file from `start` to its `size` without gap or overlap."""
    metadata = content.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{_METADATA} is not text by name")
    tensors, places = {}, []
    for name, entry in content.items():
        if name != _METADATA:
            tensors[name], place = _entry(name, entry, start)
            places.append(place)
    end = 0
    for first, last in sorted(places):
        if first != end:
            raise ValueError(f"its tensors overlap, or leave a gap, at byte {min(first, end)}")
        end = last
    if end != size - start:
        raise ValueError(
            f"its tensors need {end} bytes, but there are {size - start}; cut off, or with something behind"
        )
    return tensors


def _entry(name: str, entry: Any, start: int) -> tuple[Stored, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {short(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_counts(shape) and len(shape) <= _MOST_DIMENSIONS):
        raise ValueError(f"tensor {short(name)} has the shape {short(shape)}")
    if not (_counts(place) and len(place) == 2 and place[0] <= place[1]):
        raise ValueError(f"tensor {short(name)} lies at {short(place)}")
    if not isinstance(dtype, str):
        raise ValueError(f"tensor {short(name)} is of type {short(dtype)}")
    size = _SIZES.get(dtype)
    if size is not None and math.prod(shape) * size != place[1] - place[0]:
        raise ValueError(f"tensor {short(name)} of shape {short(shape)} in {place[1] - place[0]} bytes of {dtype}")
    return Stored(dtype, tuple(shape), start + place[0]), (place[0], place[1])


def _counts(value: Any) -> bool:
    """A list of whole numbers from 0 that a file can have places for."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _check(path: Path, tensors: Mapping[str, Stored], limits: Limits) -> None:
    if len(tensors) > limits.tensors:
        raise AdapterError(f"{path} holds {len(tensors)} tensors; at most {limits.tensors} are allowed")
    for name, (dtype, shape, _) in tensors.items():
        if not name or not name.isprintable() or len(name) > _LONGEST_NAME:
            what = "cannot be printed" if len(name) <= _LONGEST_NAME else f"is longer than {_LONGEST_NAME} characters"
            raise AdapterError(f"{path}: tensor {short(name)} has a name that {what}")
        if dtype not in limits.dtypes or dtype not in _SIZES:
            expected = ", ".join(sorted(limits.dtypes))
            raise AdapterError(f"{path}: tensor '{name}' is of type {clean(dtype, 20)}; expected {expected}")
        if 0 in shape and (not limits.empty or max(shape) > _LARGEST_EMPTY):
            raise AdapterError(f"{path}: tensor '{name}' has shape {shape}; expected dimensions from 1")
