"""Adapters as PEFT folders: what `PeftModel.from_pretrained(base, folder)` loads, written by anyone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from fedlora.adapter import Adapter, Layout
from fedlora.atomic import write_atomic
from fedlora.config import divisor
from fedlora.errors import AdapterError
from fedlora.tensorfile import StoredTensors, read_tensors, serialise

WEIGHTS, CONFIGURATION = "adapter_model.safetensors", "adapter_config.json"
PICKLE = "adapter_model.bin"
DESCRIPTION = "fedlora.json"
"""What fedlora knows of an adapter of its own, beside PEFT's files: the base model, the labels."""
_NAME = re.compile(r"\^?(?:[\w.\-]|\\[^\w\s])+\$?")
"""A module's name, or the end of one, also as PEFT's expressions have it."""
_LARGEST_CONFIGURATION = 10_000_000
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Values of `init_lora_weights` with which PEFT alters the base weights, by rank, whenever it loads the adapter."""
_OTHER_KINDS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
"""Settings of PEFT's with which a module's update is not just (alpha/r)·B·A of two matrices."""

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
    magnitude_shapes: Mapping[str, tuple[int, ...]]

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
    stored = StoredTensors(weights_file(path))
    try:
        layout = Layout.of(stored)
        adapter = Adapter.stored(stored, layout)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None
    _check_layout(path, layout, variant, len(stored))
    shapes = {m: (*stored.shapes[b], stored.shapes[a][1]) for m, (b, a) in sorted(layout.factors.items())}
    head = {name: stored.shapes[place] for name, place in layout.head.items()}
    magnitudes = {module: stored.shapes[place] for module, place in layout.magnitudes.items()}
    scaling = _scaling(path, config, variant, shapes)
    return PeftFolder(path, adapter, stored, config, variant, scaling, shapes, head, magnitudes)


def weights_file(path: Path) -> Path:
    """The file with a folder's weights.

    Raises:
        AdapterError: it is not there, in several parts, or a pickle.
    """
    place = path / WEIGHTS
    if place.is_file():
        return place
    if (path / PICKLE).exists():
        raise AdapterError(f"{path}: {PICKLE} is a pickle, which can run code when read; save it as safetensors")
    if (path / f"{WEIGHTS}.index.json").exists():
        raise AdapterError(f"{path}: the weights are in several files ({WEIGHTS}.index.json); save them as one")
    state = "not a file" if place.exists() else "missing"
    raise AdapterError(f"{path} is no PEFT adapter folder: {WEIGHTS} is {state}")


def _check_layout(path: Path, layout: Layout, variant: Variant, tensors: int) -> None:
    """Every tensor has a place of its own, and the factors and magnitudes are those of the variant."""
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


def _configuration(path: Path) -> dict[str, Any]:
    place = path / CONFIGURATION
    try:
        if not place.is_file():
            raise OSError(f"{'not a file' if place.exists() else 'no such file'}")
        if place.stat().st_size > _LARGEST_CONFIGURATION:
            raise OSError(f"{place.stat().st_size} bytes are too many")
        content = json.loads(place.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is no PEFT adapter folder: {CONFIGURATION} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{place} should hold keys and values")
    for key in _OTHER_KINDS:
        if content.get(key):
            raise AdapterError(f"{place}: {key} is set; adapters of this kind cannot be aggregated")
    for name in content.get("modules_to_save") or ():
        if not (isinstance(name, str) and _NAME.fullmatch(name)):
            raise AdapterError(f"{place}: modules_to_save has {name!r}; expected names of modules")
    if str(content.get("init_lora_weights")).lower().startswith(_CHANGE_THE_BASE):
        raise AdapterError(
            f"{place}: init_lora_weights={content['init_lora_weights']!r} changes the base weights; convert the "
            "adapter to plain LoRA when saving it (PEFT: path_initial_model_for_weight_conversion)"
        )
    return content


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for index, (key, _) in enumerate(pairs) if key in dict(pairs[:index]))
        raise ValueError(f"key {twice!r} is there twice")
    return content


def _variant(path: Path, config: Mapping[str, Any]) -> Variant:
    kind = str(config.get("peft_type", "")).upper()
    if kind == "HIRA":
        return "hira"
    if kind != "LORA":
        raise AdapterError(f"{path / CONFIGURATION}: peft_type is {config.get('peft_type')!r}; expected LORA or HIRA")
    if config.get("use_dora"):
        return "dora"
    return "rslora" if config.get("use_rslora") else "lora"


def _scaling(
    path: Path, config: Mapping[str, Any], variant: Variant, shapes: Mapping[str, tuple[int, int, int]]
) -> float:
    """The one s of all modules, from `r`, `lora_alpha` and their patterns."""
    found: dict[str, float] = {}
    try:
        ranks, alphas = Pattern(config.get("rank_pattern")), Pattern(config.get("alpha_pattern"))
    except AdapterError as error:
        raise AdapterError(f"{path / CONFIGURATION}: {error}") from None
    for module, (_, rank, _) in shapes.items():
        said = ranks.of(module, config.get("r", 8))
        if said != rank or rank < 1:
            raise AdapterError(
                f"{path}: module '{module}' has rank {rank}, but {CONFIGURATION} says r={said!r}; "
                "its scaling alpha/r cannot be told"
            )
        alpha = alphas.of(module, config.get("lora_alpha", 8))
        if variant != "hira" and not (isinstance(alpha, int | float) and math.isfinite(alpha) and alpha > 0):
            raise AdapterError(f"{path / CONFIGURATION}: lora_alpha is {alpha!r}; expected a positive number")
        root = bool(config.get("use_rslora"))
        found[module] = 1.0 if variant == "hira" else alpha / divisor(rank, root)
    lowest, highest = min(found, key=lambda m: found[m]), max(found, key=lambda m: found[m])
    if not math.isclose(found[lowest], found[highest], rel_tol=1e-9):
        raise AdapterError(
            f"{path}: modules have different alpha/r ('{lowest}': {found[lowest]:g}, '{highest}': {found[highest]:g}); "
            "expected one for all"
        )
    return found[highest]


class Pattern:
    """PEFT's `rank_pattern` or `alpha_pattern`: values of modules by regular expressions for the end of their names, of
    which the first that fits counts.

    They come from strangers, so none is given to `re`, where some take for ever: names are looked up, and what PEFT's
    users write besides (`.*`, `\\d+`, `[0-3]`, `(q|v)_proj`) is followed one character at a time.

    Raises:
        AdapterError: not keys and values, or an expression beyond that.
    """

    _LONGEST = 500
    """Characters of all expressions that are not plain names."""
    _PIECE = re.compile(
        r"(?P<one>\\[dw]|\\[^\w\s]|\[\^?[\w\-]+\]|[\w.\-])(?P<times>[*+?]?)\??"
        r"|\((?:\?:)?(?P<words>(?:[\w.\-|]|\\[^\w\s])+)\)(?![*+?{])"
    )

    def __init__(self, pattern: Any) -> None:
        if pattern is not None and not isinstance(pattern, dict):
            raise AdapterError(f"a pattern of ranks or alphas is {pattern!r}; expected keys and values")
        self._values = list((pattern or {}).values())
        self._names: dict[str, int] = {}
        self._expressions: list[tuple[int, bool, list[re.Match[str]]]] = []
        others = {key: place for place, key in enumerate(pattern or {}) if not _NAME.fullmatch(key)}
        if sum(map(len, others)) > self._LONGEST:
            raise AdapterError("the regular expressions of its patterns are too long; name the modules instead")
        for place, key in enumerate(pattern or {}):
            if key not in others:
                self._names.setdefault(key.removesuffix("$").replace("\\", ""), place)
            for part in key.split("|") if "(" not in key else [key]:
                if key in others:
                    self._expressions.append((place, part.startswith("^"), self._pieces(part)))

    def of(self, module: str, default: Any) -> Any:
        """The value of a module."""
        starts = [0, *(place + 1 for place, letter in enumerate(module) if letter == ".")]
        found = [self._names.get(f"^{module}"), *(self._names.get(module[start:]) for start in starts)]
        for place, whole, pieces in self._expressions:
            places = {0} if whole else set(starts)
            for piece in pieces:
                places = _after(piece, module, places)
            if len(module) in places:
                found.append(place)
        known = [place for place in found if place is not None]
        return self._values[min(known)] if known else default

    def _pieces(self, key: str) -> list[re.Match[str]]:
        text, pieces = key.removeprefix("^").removesuffix("$"), []
        while text:
            piece = self._PIECE.match(text)
            if piece is None:
                raise AdapterError(f"pattern {key!r} is not understood at {text[:20]!r}; name the modules instead")
            pieces.append(piece)
            text = text[piece.end() :]
        return pieces


def _after(piece: re.Match[str], module: str, places: Iterable[int]) -> set[int]:
    """Where in a module's name one can be after a piece of an expression, coming from any of `places`."""
    if piece["words"]:
        words = piece["words"].replace("\\", "").split("|")
        return {place + len(word) for place in places for word in words if module.startswith(word, place)}
    here, after = set(places), set()
    for place, letter in enumerate(module):
        if _fits(piece["one"], letter) and (place in here or (place in after and piece["times"] in ("*", "+"))):
            after.add(place + 1)
    return after | here if piece["times"] in ("*", "?") else after


@lru_cache(maxsize=4096)
def _fits(one: str, letter: str) -> bool:
    try:
        return re.fullmatch(one, letter) is not None
    except re.error:
        return False


def config_at_ranks(config: Mapping[str, Any], ranks: Mapping[str, int], scaling: float) -> dict[str, Any]:
    """A PEFT configuration for an adapter of these ranks by module, with alpha so that the scaling stays.

    Modules that a regular expression chose are named instead: what a stranger wrote is for nobody's `re`.
    """
    highest = max(ranks.values())
    content: dict[str, Any] = {**config, "r": highest, "inference_mode": True}
    other = {module: rank for module, rank in sorted(ranks.items()) if rank != highest}
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
            f"^{re.escape(module)}": _alpha(scaling, rank, root) for module, rank in other.items()
        }
    return content


def _alpha(scaling: float, rank: int, root: bool) -> float:
    alpha = scaling * divisor(rank, root)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
