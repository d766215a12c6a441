"""Adapters as PEFT folders: what `PeftModel.from_pretrained(base, folder)` loads, written by anyone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedlora.adapter.weights import PEFT_PREFIX, Adapter, Layout, without_wrappers
from fedlora.config.lora import divisor
from fedlora.errors import AdapterError
from fedlora.exchange.peftconfig import CONFIGURATION, Variant, read_with_notes, variant_of
from fedlora.files.atomic import write_atomic
from fedlora.files.limits import OWN, UPLOAD, Limits, clean, file_within
from fedlora.files.tensorfile import StoredTensors, read_tensors, serialise
from fedlora.model.peftpattern import Pattern, chooses

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
DESCRIPTION = "fedlora.json"
"""What fedlora knows of an adapter of its own, beside PEFT's files: the base model, the labels."""
TOKENS = ".token_adapter.trainable_tokens_delta"
"""How the name of a tensor with the rows of `trainable_token_indices` ends, behind that of the embedding."""
_INNER = ".base_layer."
"""Between a module and a layer within it that PEFT adapts together with it, such as nn.MultiheadAttention's."""
_SHARDED = "_flat_param"
"""What FSDP names a part of all parameters."""


def write_peft_folder(adapter: Adapter, folder: Path, peft_config: Mapping[str, object], card: str) -> None:
    """A folder that `PeftModel.from_pretrained(base, folder)` loads: configuration, weights, README card.

    Raises:
        RunFolderError: it cannot be written; what was there before is intact.
    """
    configuration = json.dumps(peft_config, indent=2, sort_keys=True) + "\n"
    write_atomic(folder / WEIGHTS, serialise(adapter.tensors(), {"format": "pt"}))
    write_atomic(folder / CONFIGURATION, configuration.encode())
    write_atomic(folder / "README.md", card.encode())


def check_written(folder: Path, adapter: Adapter, scalings: Mapping[str, float]) -> None:
    """Prove that what PEFT loads from a folder is what was meant to be written: it reads back as these tensors in these
    scalings, and PEFT has a place for each of them, as far as that can be told without the base model.

    Raises:
        AdapterError: it is not.
    """
    try:
        found = open_peft_folder(folder, OWN)
    except AdapterError as error:
        raise AdapterError(f"what was written is not what PEFT would load: {error}") from error
    wrong = [m for m, s in scalings.items() if not math.isclose(found.scalings.get(m, 0.0), s, rel_tol=1e-6)]
    wanted = adapter.tensors()
    wrong += sorted(found.stored.keys() ^ wanted.keys()) + passed_over(found)
    wrong += [name for name, tensor in found.stored.items() if name in wanted and not torch.equal(tensor, wanted[name])]
    if wrong:
        raise AdapterError(f"what was written is not what PEFT would load: '{wrong[0]}' in {folder}")


def passed_over(folder: PeftFolder) -> list[str]:
    """The names of modules and head tensors that PEFT would not load, or not in their place: a module that the
    configuration does not choose, and a weight or bias of an adapted module that is not named as that of the base."""
    owners = {module.partition(_INNER)[0] for module in folder.shapes}
    found = [module for module in owners if not _chooses(folder.config, [module])]
    if folder.config["peft_type"] not in ("LORA", "HIRA"):
        found.append("peft_type")
    return sorted(found) + sorted(name for name in folder.head_shapes if name.rpartition(".")[0] in folder.shapes)


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
    what `fedlora.exchange.peftconfig` lets through. `tokens[tensor]` are the tokens that the rows of a head tensor are
    of, where it holds those of some tokens alone. `notes` are what does not stop anybody from reading it, but should be
    known.
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
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
        path: the folder. Its files may not be links that lead out of it (see `fedlora.files.limits.file_within`).
        limits: what its tensors may take.

    Raises:
        AdapterError: the folder, its configuration or its tensors are not those of a LoRA or HiRA adapter.
    """
    config, unknown = read_with_notes(path)
    variant = variant_of(config)
    stored = StoredTensors(weights_file(path), limits)
    _check_names(path, stored)
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
    tokens = _tokens(path, config, head)
    notes = _notes(stored, unknown)
    return PeftFolder(path, adapter, stored, config, variant, scalings, shapes, head, magnitudes, tokens, notes)


def adapter_folder(path: Path) -> Path | None:
    """The folder of an adapter: itself, or `adapter` in that of a finished run; None where neither is one."""
    folders = (path, path / "adapter")
    return next(
        (folder for folder in folders if any((folder / name).is_file() for name in (WEIGHTS, DESCRIPTION))), None
    )


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


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Every name is one that PEFT gives a tensor, but for wrappers that are known: of others it would load nothing."""
    for name in names:
        plain = without_wrappers(name)
        if plain.startswith(PEFT_PREFIX):
            continue
        if f".{PEFT_PREFIX}" in plain or plain.startswith("module."):
            raise AdapterError(
                f"{path}: tensor '{name}' has something before or instead of '{PEFT_PREFIX}', and whether that is a "
                "wrapper or the model's own cannot be told; save the adapter of the model within it"
            )
    if sharded := next((name for name in names if _SHARDED in name.split(".")), None):
        raise AdapterError(f"{path}: tensor '{sharded}' is a part of FSDP's; gather the adapter before saving it")


def _notes(names: Iterable[str], unknown: Sequence[str]) -> tuple[str, ...]:
    found = []
    if wrapped := next((name for name in names if without_wrappers(name) != name), None):
        found.append(f"names of wrappers were taken off its tensors ('{wrapped}' is '{without_wrappers(wrapped)}')")
    if unknown:
        found.append(f"{CONFIGURATION} has keys that are not known here and were passed over: {', '.join(unknown[:5])}")
    return tuple(found)


def _tokens(path: Path, config: Mapping[str, Any], head: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tokens of every tensor that has rows of some alone."""
    given = config.get("trainable_token_indices")
    tensors = {name: name.removesuffix(TOKENS) for name in head if name.endswith(TOKENS)}
    found: dict[str, tuple[int, ...]] = {}
    for name, module in tensors.items():
        fitting = given.items() if isinstance(given, dict) else [("", given)] if given is not None else []
        lists = {tuple(rows) for key, rows in fitting if module.endswith(key)}
        if len(lists) != 1 or (isinstance(given, list) and len(tensors) > 1):
            raise AdapterError(
                f"{path}: trainable_token_indices in {CONFIGURATION} does not say which rows '{name}' holds"
            )
        (rows,) = lists
        if len(set(rows)) < len(rows) or len(head[name]) != 2 or head[name][0] != len(rows):
            raise AdapterError(
                f"{path}: tensor '{name}' has shape {head[name]}, but trainable_token_indices names "
                f"{len(set(rows))} different tokens in {len(rows)} places"
            )
        found[name] = rows
    if given and not tensors:
        raise AdapterError(f"{path}: trainable_token_indices is set, but {WEIGHTS} has no tensor '…{TOKENS}'")
    return found


def _check_layout(path: Path, layout: Layout, variant: Variant, tensors: int) -> None:
    """Every tensor has a place of its own, and the factors and magnitudes are those of the variant."""
    for module in layout.cores:
        raise AdapterError(f"{path}: module '{module}' has a core between its factors, which PEFT folders do not hold")
    if 2 * len(layout.factors) + len(layout.head) + len(layout.magnitudes) != tensors:
        raise AdapterError(
            f"{path}: {WEIGHTS} holds a tensor under two names, with and without 'base_model.model.' or a wrapper"
        )
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
        named = module.partition(_INNER)[0]  # PEFT looks up the module around
        said = ranks.of(named, config.get("r", _RANK_OF_HIRA if variant == "hira" else _RANK))
        if said != rank:
            raise AdapterError(
                f"{path}: module '{module}' has rank {rank}, but {CONFIGURATION} says r={said}; "
                "its scaling alpha/r cannot be told"
            )
        alpha = alphas.of(named, config.get("lora_alpha", _ALPHA))
        found[module] = 1.0 if variant == "hira" else alpha / divisor(rank, bool(config.get("use_rslora")))
    return found


_RANK, _RANK_OF_HIRA, _ALPHA = 8, 32, 8
"""What PEFT takes where a configuration does not say."""


def config_at_ranks(
    config: Mapping[str, Any],
    ranks: Mapping[str, int],
    scaling: float | Mapping[str, float],
    tokens: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """A PEFT configuration for an adapter of these ranks by module, with alphas so that the scaling, one or by module,
    stays; and of these tokens by name of the tensor with their rows, where given.

    Modules that a regular expression chose are named instead: what a stranger wrote is for nobody's `re`.
    """
    scalings = scaling if isinstance(scaling, Mapping) else dict.fromkeys(ranks, scaling)
    content = _content_at(config, ranks, scalings)
    if tokens is not None:
        rows = {name.removesuffix(TOKENS): list(each) for name, each in tokens.items()}
        alone = len(rows) == 1 and isinstance(config.get("trainable_token_indices"), list)
        content["trainable_token_indices"] = next(iter(rows.values())) if alone else rows or None
    return content


def _content_at(config: Mapping[str, Any], ranks: Mapping[str, int], scalings: Mapping[str, float]) -> dict[str, Any]:
    """The configuration with the ranks, and alphas for the scalings, of modules by name."""
    named = sorted({module.partition(_INNER)[0] for module in ranks})
    most = max(ranks, key=lambda module: ranks[module])
    highest, scaling = ranks[most], scalings[most]
    content: dict[str, Any] = {**config, "r": highest, "inference_mode": True}
    other = {m: rank for m, rank in sorted(ranks.items()) if rank != highest or scalings[m] != scaling}
    content["rank_pattern"] = {_key(module): rank for module, rank in other.items()}
    if not _chooses(config, named):
        content |= {"target_modules": named, "exclude_modules": None}
        content |= {"layers_pattern": None, "layers_to_transform": None}
    if str(config.get("peft_type", "")).upper() != "HIRA":
        root = bool(config.get("use_rslora"))
        content["lora_alpha"] = _alpha(scaling, highest, root)
        content["alpha_pattern"] = {
            _key(module): _alpha(scalings[module], rank, root) for module, rank in other.items()
        }
    return content


def _key(module: str) -> str:
    """A pattern for a module alone, which is also that of a layer within it."""
    return f"^{re.escape(module.partition(_INNER)[0])}"


def _chooses(config: Mapping[str, Any], modules: Sequence[str]) -> bool:
    """Whether PEFT adapts all these modules by the configuration's own list of names, with nothing that takes some out
    again."""
    names = config.get("target_modules")
    if not isinstance(names, list) or any(config.get(k) for k in ("exclude_modules", "layers_pattern")):
        return False
    if config.get("layers_to_transform") is not None:
        return False
    return all(any(chooses(name, m) for name in names) for m in modules)


def _alpha(scaling: float, rank: int, root: bool) -> float:
    alpha = scaling * divisor(rank, root)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
