"""Adapters as PEFT folders: what `PeftModel.from_pretrained(base, folder)` loads, written by anyone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter, Layout
from fedlora.atomic import write_atomic
from fedlora.errors import AdapterError
from fedlora.limits import UPLOAD, Limits, clean, file_within
from fedlora.lora_config import divisor
from fedlora.peftconfig import CONFIGURATION, Variant, read_configuration, variant_of
from fedlora.peftpattern import Pattern
from fedlora.tensorfile import StoredTensors, read_tensors, serialise

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
DESCRIPTION = "fedlora.json"
"""What fedlora knows of an adapter of its own, beside PEFT's files: the base model, the labels."""


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
    path = folder / WEIGHTS
    tensors = read_tensors(path, UPLOAD)
    try:
        return Adapter.from_tensors(tensors)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None


@dataclass(frozen=True)
class PeftFolder:
    """A PEFT folder whose tensors are read when they are looked at.

    `shapes[module]` is (d_out, rank, d_in); `scalings[module]` is s = alpha/r, or alpha/√r for rsLoRA. `config` holds
    what `fedlora.peftconfig` lets through.
    """

    path: Path
    adapter: Adapter
    stored: StoredTensors
    config: Mapping[str, Any]
    variant: Variant
    scalings: Mapping[str, float]
    shapes: Mapping[str, tuple[int, int, int]]
    head_shapes: Mapping[str, tuple[int, ...]]
    magnitude_shapes: Mapping[str, tuple[int, ...]]

    @property
    def rank(self) -> int:
        """The highest rank of any module."""
        return max(rank for _, rank, _ in self.shapes.values())

    @property
    def scaling(self) -> float:
        """The one s of all modules.

        Raises:
            AdapterError: they have different ones.
        """
        lowest, highest = (choose(self.scalings, key=lambda m: self.scalings[m]) for choose in (min, max))
        one, other = self.scalings[lowest], self.scalings[highest]
        if not math.isclose(one, other, rel_tol=1e-9):
            raise AdapterError(
                f"{self.path}: modules have different alpha/r ('{lowest}': {one:g}, '{highest}': {other:g}); "
                "expected one for all"
            )
        return other

    def peft_content(self) -> dict[str, Any]:
        """A configuration that says the same to PEFT, and gives it no regular expression of a stranger's."""
        ranks = {module: rank for module, (_, rank, _) in self.shapes.items()}
        return _content_at(self.config, ranks, self.scalings)


def open_peft_folder(path: Path, limits: Limits = UPLOAD) -> PeftFolder:
    """Check a folder's configuration and the names, types and shapes of its tensors; no tensor is read.

    Args:
        path: the folder. Its files may not be links that lead out of it (see `fedlora.limits.file_within`).
        limits: what its tensors may take.

    Raises:
        AdapterError: the folder, its configuration or its tensors are not those of a LoRA or HiRA adapter.
    """
    config = read_configuration(path)
    variant = variant_of(config)
    stored = StoredTensors(weights_file(path), limits)
    try:
        layout = Layout.of(stored)
        adapter = Adapter.stored(stored, layout)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    _check_layout(path, layout, variant, len(stored))
    shapes = {}
    for module, (b, a) in sorted(layout.factors.items()):
        (d_out, rank), d_in = stored.shapes[b], stored.shapes[a][1]
        shapes[module] = d_out, rank, d_in
    head = {name: stored.shapes[place] for name, place in layout.head.items()}
    magnitudes = {module: stored.shapes[place] for module, place in layout.magnitudes.items()}
    scalings = _scalings(path, config, variant, shapes)
    return PeftFolder(path, adapter, stored, config, variant, scalings, shapes, head, magnitudes)


def weights_file(path: Path) -> Path:
    """The file with a folder's weights.

    Raises:
        AdapterError: it is not there, in several parts, a pickle, or a link that leads out of the folder.
    """
    try:
        place = file_within(path, WEIGHTS)
        if place.is_file():
            return place
        pickled, split = (path / PICKLE).exists(), (path / f"{WEIGHTS}.index.json").exists()
        state = "not a file" if place.exists() else "missing"
    except OSError as error:
        raise AdapterError(f"{path} is no PEFT adapter folder: {clean(error.strerror or str(error))}") from None
    if pickled:
        raise AdapterError(f"{path}: {PICKLE} is a pickle, which can run code when read; save it as safetensors")
    if split:
        raise AdapterError(f"{path}: the weights are in several files ({WEIGHTS}.index.json); save them as one")
    raise AdapterError(f"{path} is no PEFT adapter folder: {WEIGHTS} is {state}")


def _check_layout(path: Path, layout: Layout, variant: Variant, tensors: int) -> None:
    """Every tensor has a place of its own, and the factors and magnitudes are those of the variant."""
    for module in layout.cores:
        raise AdapterError(f"{path}: module '{module}' has a core between its factors, which PEFT folders do not hold")
    if 2 * len(layout.factors) + len(layout.head) + len(layout.magnitudes) != tensors:
        raise AdapterError(f"{path}: {WEIGHTS} holds a tensor under two names, with and without 'base_model.model.'")
    for module in layout.factors:
        if layout.kinds.get(module, "linear").startswith("hira") != (variant == "hira"):
            raise AdapterError(
                f"{path}: the factors of module '{module}' are not those of {variant}, which {CONFIGURATION} says"
            )
    for module in sorted(layout.factors.keys() ^ layout.magnitudes.keys() if variant == "dora" else layout.magnitudes):
        state = "is not expected" if module in layout.magnitudes else "is missing"
        raise AdapterError(f"{path}: the magnitude vector of module '{module}' {state} ({CONFIGURATION}: {variant})")


def _scalings(
    path: Path, config: Mapping[str, Any], variant: Variant, shapes: Mapping[str, tuple[int, int, int]]
) -> dict[str, float]:
    """The s of every module, from `r`, `lora_alpha` and their patterns."""
    found: dict[str, float] = {}
    try:
        ranks, alphas = Pattern(config.get("rank_pattern")), Pattern(config.get("alpha_pattern"))
    except AdapterError as error:
        raise AdapterError(f"{path / CONFIGURATION}: {error}") from None
    for module, (_, rank, _) in shapes.items():
        said = ranks.of(module, config.get("r", _RANK_OF_HIRA if variant == "hira" else _RANK))
        if said != rank:
            raise AdapterError(
                f"{path}: module '{module}' has rank {rank}, but {CONFIGURATION} says r={said}; "
                "its scaling alpha/r cannot be told"
            )
        alpha = alphas.of(module, config.get("lora_alpha", _ALPHA))
        found[module] = 1.0 if variant == "hira" else alpha / divisor(rank, bool(config.get("use_rslora")))
    return found


_RANK, _RANK_OF_HIRA, _ALPHA = 8, 32, 8
"""What PEFT takes where a configuration does not say."""


def config_at_ranks(config: Mapping[str, Any], ranks: Mapping[str, int], scaling: float) -> dict[str, Any]:
    """A PEFT configuration for an adapter of these ranks by module, with alpha so that the scaling stays.

    Modules that a regular expression chose are named instead: what a stranger wrote is for nobody's `re`.
    """
    return _content_at(config, ranks, dict.fromkeys(ranks, scaling))


def _content_at(config: Mapping[str, Any], ranks: Mapping[str, int], scalings: Mapping[str, float]) -> dict[str, Any]:
    """The configuration with the ranks, and alphas for the scalings, of modules by name."""
    most = max(ranks, key=lambda module: ranks[module])
    highest, scaling = ranks[most], scalings[most]
    content: dict[str, Any] = {**config, "r": highest, "inference_mode": True}
    other = {m: rank for m, rank in sorted(ranks.items()) if rank != highest or scalings[m] != scaling}
    content["rank_pattern"] = {f"^{re.escape(module)}": rank for module, rank in other.items()}
    if config.get("layers_pattern") or any(
        isinstance(config.get(k), str) for k in ("target_modules", "exclude_modules")
    ):
        content |= {"target_modules": sorted(ranks), "exclude_modules": None}
        content |= {"layers_pattern": None, "layers_to_transform": None}
    if str(config.get("peft_type", "")).upper() != "HIRA":
        root = bool(config.get("use_rslora"))
        content["lora_alpha"] = _alpha(scaling, highest, root)
        content["alpha_pattern"] = {
            f"^{re.escape(module)}": _alpha(scalings[module], rank, root) for module, rank in other.items()
        }
    return content


def _alpha(scaling: float, rank: int, root: bool) -> float:
    alpha = scaling * divisor(rank, root)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
