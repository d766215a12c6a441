"""LoRA weights as typed values, and the one place that parses parameter names.

A name is taken apart once, at the edge, into a module and a part; nowhere else is A told from B by shape or substring.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedlora.atomic import write_atomic
from fedlora.errors import AdapterError

Part = Literal["A", "B", "head"]

PEFT_PREFIX = "base_model.model."
_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])\.weight$")


class ParameterName(NamedTuple):
    """What a parameter is: part `A` or `B` of a module, or `head` with the parameter's own name."""

    part: Part
    module: str


def parse_name(name: str) -> ParameterName:
    """Take a PEFT state-dict name apart, with or without the `base_model.model.` prefix.

    Raises:
        AdapterError: a name that says it is an adapter's, but is neither factor (DoRA magnitudes, embeddings).
    """
    bare = name.removeprefix(PEFT_PREFIX)
    if match := _FACTOR.match(bare):
        return ParameterName("A" if match["part"] == "A" else "B", match["module"])
    if ".lora_" in bare:
        raise AdapterError(
            f"parameter '{name}' is not a factor of a linear layer; only lora_A and lora_B are understood"
        )
    return ParameterName("head", bare)


@dataclass(frozen=True)
class Factors:
    """One module's adapter: `B` (d_out × r) and `A` (r × d_in); the module's update is `s·B@A`."""

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise AdapterError(
                f"factors do not fit: B is {tuple(self.B.shape)} and A is {tuple(self.A.shape)}; "
                "expected B (d_out × r) and A (r × d_in)"
            )

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    def to(self, dtype: torch.dtype) -> Factors:
        return Factors(self.B.to(dtype), self.A.to(dtype))

    def product(self) -> Tensor:
        """The dense product `B@A` (d_out × d_in), without the scaling."""
        return self.B @ self.A


@dataclass(frozen=True)
class Adapter:
    """All factors of a model, by module, and the head: every other trained tensor, by name."""

    factors: Mapping[str, Factors]
    head: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(sorted(self.factors))

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((factors.rank for factors in self.factors.values()), default=0)

    def tensors(self, parts: frozenset[Part] = frozenset({"A", "B", "head"})) -> dict[str, Tensor]:
        """PEFT state-dict names to contiguous tensors, for the parts asked for."""
        named: dict[str, Tensor] = {}
        for module in self.modules:
            factors = self.factors[module]
            if "A" in parts:
                named[f"{PEFT_PREFIX}{module}.lora_A.weight"] = factors.A.contiguous()
            if "B" in parts:
                named[f"{PEFT_PREFIX}{module}.lora_B.weight"] = factors.B.contiguous()
        if "head" in parts:
            named |= {f"{PEFT_PREFIX}{name}": self.head[name].contiguous() for name in sorted(self.head)}
        return named

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Adapter:
        """The inverse of `tensors`.

        Raises:
            AdapterError: a module with only one of its factors, shapes that do not fit, no module at all.
        """
        halves: dict[str, dict[str, Tensor]] = {}
        head: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            part, module = parse_name(name)
            if part == "head":
                head[module] = tensor
            else:
                halves.setdefault(module, {})[part] = tensor
        for module, parts in halves.items():
            if missing := {"A", "B"} - parts.keys():
                raise AdapterError(f"module '{module}' has no lora_{missing.pop()}")
        if not halves:
            raise AdapterError("no LoRA factors among the tensors; expected names like '<module>.lora_A.weight'")
        return cls({module: Factors(parts["B"], parts["A"]) for module, parts in halves.items()}, head)

    def check_like(self, other: Adapter, who: str) -> None:
        """Refuse an adapter that does not have the modules, shapes and finite values of `other`.

        Raises:
            AdapterError: naming `who` and the tensor.
        """
        mine, theirs = self.tensors(), other.tensors()
        for name in sorted(theirs.keys() ^ mine.keys()):
            raise AdapterError(f"{who}: tensor '{name}' is {'missing' if name in theirs else 'not expected'}")
        for name, tensor in mine.items():
            if tensor.shape != theirs[name].shape:
                raise AdapterError(
                    f"{who}: tensor '{name}' has shape {tuple(tensor.shape)}, expected {tuple(theirs[name].shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise AdapterError(f"{who}: tensor '{name}' has values that are not finite (training diverged?)")


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Tensors as safetensors bytes, the form in which they are stored and sent."""
    content: bytes = save(dict(tensors), metadata=dict(metadata or {}))
    return content


def wire_size(adapter: Adapter, parts: frozenset[Part]) -> tuple[int, int]:
    """Bytes of an adapter's factors and of its head as sent (serialised; 0 for what is not sent)."""
    factors = adapter.tensors(parts - {"head"})
    head = adapter.tensors(parts & {"head"})
    return (len(serialise(factors)) if factors else 0), (len(serialise(head)) if head else 0)


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


def write_peft_folder(adapter: Adapter, folder: Path, peft_config: Mapping[str, object], card: str) -> None:
    """A folder that `PeftModel.from_pretrained(base, folder)` loads: configuration, weights, README card.

    Raises:
        RunFolderError: it cannot be written; what was there before is intact.
    """
    configuration = json.dumps(peft_config, indent=2, sort_keys=True) + "\n"
    write_atomic(folder / "adapter_model.safetensors", serialise(adapter.tensors(), {"format": "pt"}))
    write_atomic(folder / "adapter_config.json", configuration.encode())
    write_atomic(folder / "README.md", card.encode())


def read_peft_folder(folder: Path) -> Adapter:
    """The adapter in a PEFT folder.

    Raises:
        AdapterError: no `adapter_model.safetensors`, or not an adapter's content.
    """
    return Adapter.from_tensors(read_tensors(folder / "adapter_model.safetensors"))
