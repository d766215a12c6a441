"""Adapters as PEFT folders: what `PeftModel.from_pretrained(base, folder)` loads, written by anyone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedlora.adapter import Adapter, Layout
from fedlora.atomic import write_atomic
from fedlora.errors import AdapterError
from fedlora.tensorfile import StoredTensors, read_tensors, serialise

WEIGHTS, CONFIGURATION = "adapter_model.safetensors", "adapter_config.json"
PICKLE = "adapter_model.bin"

Variant = Literal["lora", "rslora", "dora", "hira"]


def write_peft_folder(adapter: Adapter, folder: Path, peft_config: Mapping[str, object], card: str) -> None:
    """A folder that `PeftModel.from_pretrained(base, folder)` loads: configuration, weights, README card.

    Raises:
        RunFolderError: it cannot be written; what was there before is intact.
    """
    configuration = json.dumps(peft_config, indent=2, sort_keys=True) + "\n"
    write_atomic(folder / WEIGHTS, serialise(adapter.tensors(), {"format": "pt"}))
    write_atomic(folder / CONFIGURATION, configuration.encode())
    write_atomic(folder / "README.md", card.encode())


def read_peft_folder(folder: Path) -> Adapter:
    """The adapter in a PEFT folder.

    Raises:
        AdapterError: no `adapter_model.safetensors`, or not an adapter's content.
    """
    return Adapter.from_tensors(read_tensors(folder / WEIGHTS))


@dataclass(frozen=True)
class PeftFolder:
    """A PEFT folder whose tensors are read when they are looked at.

    `shapes[module]` is (d_out, rank, d_in); `scaling` is s = alpha/r, or alpha/√r for rsLoRA, the same in every module.
    """

    path: Path
    adapter: Adapter
    stored: StoredTensors
    config: Mapping[str, Any]
    variant: Variant
    scaling: float
    shapes: Mapping[str, tuple[int, int, int]]
    head_shapes: Mapping[str, tuple[int, ...]]

    @property
    def rank(self) -> int:
        """The highest rank of any module."""
        return max(rank for _, rank, _ in self.shapes.values())


def open_peft_folder(path: Path) -> PeftFolder:
    """Check a folder's configuration and the names, types and shapes of its tensors; no tensor is read.

    Raises:
        AdapterError: the folder, its configuration or its tensors are not those of a LoRA or HiRA adapter.
    """
    config = _configuration(path)
    variant = _variant(path, config)
    if not (path / WEIGHTS).is_file() and (path / PICKLE).is_file():
        raise AdapterError(f"{path}: {PICKLE} is a pickle, which can run code when read; save it as safetensors")
    stored = StoredTensors(path / WEIGHTS)
    try:
        adapter, layout = Adapter.stored(stored), Layout.of(stored)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    shapes = {m: (*stored.shapes[b], stored.shapes[a][1]) for m, (b, a) in sorted(layout.factors.items())}
    head = {name: stored.shapes[place] for name, place in layout.head.items()}
    return PeftFolder(path, adapter, stored, config, variant, _scaling(path, config, variant, shapes), shapes, head)


def _configuration(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / CONFIGURATION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is no PEFT adapter folder: {CONFIGURATION} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{path / CONFIGURATION} should hold keys and values")
    return content


def _variant(path: Path, config: Mapping[str, Any]) -> Variant:
    kind = str(config.get("peft_type", "")).upper()
    if kind == "HIRA":
        return "hira"
    if kind != "LORA":
        raise AdapterError(f"{path / CONFIGURATION}: peft_type is '{config.get('peft_type')}'; expected LORA or HIRA")
    if config.get("use_dora"):
        return "dora"
    return "rslora" if config.get("use_rslora") else "lora"


def _scaling(
    path: Path, config: Mapping[str, Any], variant: Variant, shapes: Mapping[str, tuple[int, int, int]]
) -> float:
    """The one s of all modules, from `r`, `lora_alpha` and their patterns."""
    found: dict[str, float] = {}
    for module, (_, rank, _) in shapes.items():
        said = _of_module(config.get("rank_pattern"), module, config.get("r"))
        if said != rank or rank < 1:
            raise AdapterError(
                f"{path}: module '{module}' has rank {rank}, but {CONFIGURATION} says r={said}; "
                "its scaling alpha/r cannot be told"
            )
        alpha = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        if variant != "hira" and not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
            raise AdapterError(f"{path / CONFIGURATION}: lora_alpha is {alpha!r}; expected a positive number")
        root = bool(config.get("use_rslora"))
        found[module] = 1.0 if variant == "hira" else alpha / (math.sqrt(rank) if root else rank)
    lowest, highest = min(found, key=lambda m: found[m]), max(found, key=lambda m: found[m])
    if not math.isclose(found[lowest], found[highest], rel_tol=1e-9):
        raise AdapterError(
            f"{path}: modules have different alpha/r ('{lowest}': {found[lowest]:g}, '{highest}': {found[highest]:g}); "
            "expected one for all"
        )
    return found[highest]


def _of_module(pattern: Any, module: str, default: Any) -> Any:
    """A module's own value where a pattern of PEFT's names it (a regular expression for the end of its name)."""
    for key, value in pattern.items() if isinstance(pattern, dict) else ():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error:
            continue
    return default


def config_at_ranks(config: Mapping[str, Any], ranks: Mapping[str, int], scaling: float) -> dict[str, Any]:
    """A PEFT configuration for an adapter of these ranks by module, with alpha so that the scaling stays."""
    highest = max(ranks.values())
    content: dict[str, Any] = {**config, "r": highest, "inference_mode": True}
    other = {module: rank for module, rank in sorted(ranks.items()) if rank != highest}
    content["rank_pattern"] = {re.escape(module): rank for module, rank in other.items()}
    if str(config.get("peft_type", "")).upper() != "HIRA":
        root = bool(config.get("use_rslora"))
        content["lora_alpha"] = _alpha(scaling, highest, root)
        content["alpha_pattern"] = {re.escape(module): _alpha(scaling, rank, root) for module, rank in other.items()}
    return content


def _alpha(scaling: float, rank: int, root: bool) -> float:
    alpha = scaling * (math.sqrt(rank) if root else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
