"""What a strategy adds to the frozen base weights, as factors: versioned by round, composable, exportable.

A module's update is `left @ right` with left (d_out × k) and right (k × d_in); the scaling s is included, so that the
effective weight is `W0 + s·B·A + left·right`. Files name the tensors `<module>.left` and `<module>.right`, or
`<module>.dense` where one of them is an identity; older files hold that too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedlora.adapter.factors import ProductSum, beside_identity, is_identity
from fedlora.adapter.weights import Factors
from fedlora.errors import AdapterError
from fedlora.files.atomic import write_atomic
from fedlora.files.limits import UPLOAD, clean, file_within
from fedlora.files.tensorfile import read_tensors, serialise

FILE = "base_delta.safetensors"
_BYTES = 4


@dataclass(frozen=True)
class BaseUpdate:
    """Factors (left as `B`, right as `A`, fp32) by module; an empty one changes nothing."""

    modules: Mapping[str, Factors] = field(default_factory=dict)

    @classmethod
    def of(cls, modules: Mapping[str, Factors]) -> BaseUpdate:
        """From factors of any precision and rank; modules of rank 0 are left out, those whose rank is not below
        min(d_out, d_in) are stored as one dense matrix beside an identity."""
        return cls({name: _compact(pair) for name, pair in modules.items() if pair.rank})

    def __bool__(self) -> bool:
        return bool(self.modules)

    def plus(self, later: BaseUpdate) -> BaseUpdate:
        """Both updates, one after the other: ranks add up, to at most min(d_out, d_in)."""
        both = {
            name: _compact(self.modules[name], pair) for name, pair in later.modules.items() if name in self.modules
        }
        return BaseUpdate({**self.modules, **later.modules, **both})

    def wire_bytes(self) -> int:
        """Bytes as sent: per module the factors, or the dense matrix where that is smaller."""
        return sum(_BYTES * min(pair.rank * sum(pair.shape), math.prod(pair.shape)) for pair in self.modules.values())

    def tensors(self) -> dict[str, Tensor]:
        """`<module>.left` and `<module>.right`, or `<module>.dense`."""
        stored = {module: _stored(self.modules[module]) for module in sorted(self.modules)}
        return {
            f"{module}.{side}": each.contiguous() for module, sides in stored.items() for side, each in sides.items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> BaseUpdate:
        """The inverse of `tensors`.

        Raises:
            AdapterError: a name that is none of these, a side without the other, shapes that do not fit.
        """
        modules: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, _, side = name.rpartition(".")
            if not module or side not in ("left", "right", "dense"):
                raise AdapterError(f"base update: tensor '{name}' is no '<module>.left', '.right' or '.dense'")
            modules.setdefault(module, {})[side] = tensor
        return cls({module: _pair(module, sides) for module, sides in modules.items()})

    def write(self, folder: Path) -> None:
        """`base_delta.safetensors` in `folder`.

        Raises:
            RunFolderError: it cannot be written.
        """
        write_atomic(folder / FILE, serialise(self.tensors(), {"format": "pt"}))

    @classmethod
    def read(cls, folder: Path) -> BaseUpdate:
        """What `write` wrote; an empty update where the folder has none.

        Raises:
            AdapterError: damaged, or not a base update.
        """
        path = folder / FILE
        try:
            if not os.path.lexists(path):
                return cls()
            place = file_within(folder, FILE)
        except OSError as error:
            raise AdapterError(f"{folder}: {clean(error.strerror or str(error))}") from None
        tensors = read_tensors(place, UPLOAD)
        try:
            return cls.from_tensors(tensors)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error}") from None


def _compact(*pairs: Factors) -> Factors:
    """The sum as one pair, in fp32."""
    if len(pairs) == 1 and pairs[0].rank < min(pairs[0].shape):
        return pairs[0].to(torch.float32)
    return ProductSum.of(pairs, [1.0] * len(pairs)).factors().to(torch.float32)


def _stored(pair: Factors) -> dict[str, Tensor]:
    """Both sides, or the matrix alone where it stands beside an identity."""
    if pair.rank == min(pair.shape):
        eye, dense = (pair.B, pair.A) if pair.shape[0] <= pair.shape[1] else (pair.A, pair.B)
        if is_identity(eye):
            return {"dense": dense}
    return {"left": pair.B, "right": pair.A}


def _pair(module: str, sides: Mapping[str, Tensor]) -> Factors:
    if sides.keys() == {"dense"} and sides["dense"].ndim == 2:
        return beside_identity(sides["dense"])
    if missing := {"left", "right"} - sides.keys():
        raise AdapterError(f"base update: module '{module}' has no '{missing.pop()}', and no '.dense' alone (a matrix)")
    return Factors(sides["left"], sides["right"])
