"""What a base model is made of, as far as its configuration and its tokenizer tell: no weight is read.

The model is built on torch's `meta` device, where tensors have shapes and no memory. What came of it is kept in the
cache for as long as the files stay as they are: building it takes imports of seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from fedlora.config import ModelConfig
from fedlora.config.lora import LoraConfig
from fedlora.errors import FedloraError, ModelError, RunFolderError, first_line, remembered
from fedlora.files import home, limits
from fedlora.files.atomic import write_json
from fedlora.files.limits import FileStates
from fedlora.model.base import cannot_load, load_declared, load_tokenizer, positions_of
from fedlora.model.heads import PooledClassifier
from fedlora.model.known import KNOWN, not_installed, resolve
from fedlora.model.targets import (
    Candidates,
    adaptable_modules,
    choose,
    default_targets,
    ordinary,
    stores_transposed,
    tied_to,
)
from fedlora.objective.base import Objective

_FORMAT = 3
_DECIDING = ("transformers", "peft", "tokenizers", "torch")
"""Packages that an outline may depend on."""
_SMALL = (".json", ".txt", ".model")
"""Files of configuration and tokenizer, by their ending."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Layer:
    """A module that an adapter can be put on."""

    name: str
    d_out: int
    d_in: int
    linear: bool
    """Not so for embeddings."""
    tied: str | None = None
    """Another module with the same weight."""
    ordinary: bool = True
    """Whether `all-linear` means it."""


@dataclass(frozen=True)
class Outline:
    """A base model without its weights."""

    architecture: str
    layers: tuple[Layer, ...]
    """All that can be adapted, outside the head."""
    defaults: tuple[str, ...] | None
    """What PEFT adapts in this architecture where nothing is said."""
    positions: int | None
    """Most tokens that it reads; None where it declares no limit."""
    rows: int | None
    """Rows of the input embedding; None where it has none of the usual kind."""
    highest_token: int
    """The highest id that the tokenizer gives to text, or pads and frames it with."""
    token: str
    """The token of that id."""
    checkpoints: bool = True
    """Whether its layers can be computed again for the gradients."""

    def targets(self, lora: LoraConfig) -> tuple[Layer, ...]:
        """The layers that an adapter is put on.

        Raises:
            ModelError: nothing matches, or there is nothing to choose by.
        """
        names, linear = [each.name for each in self.layers], {each.name for each in self.layers if each.ordinary}
        chosen = set(choose(Candidates(names, linear, self.architecture, self.defaults), lora))
        return tuple(layer for layer in self.layers if layer.name in chosen)

    def check_vocabulary(self, name: str, highest: int | None = None) -> None:
        """Refuse tokens that the embedding has no row for.

        Args:
            name: of the model, for the message.
            highest: the highest id in some texts. Empty: what the tokenizer gives in any case.

        Raises:
            ModelError: there are such tokens.
        """
        reached = self.highest_token if highest is None else highest
        if self.rows is not None and reached >= self.rows:
            which = f" ({limits.short(self.token)})" if highest is None else ""
            raise ModelError(
                f"model.name={name}: its tokenizer's ids reach {reached}{which}, but the model has {self.rows} rows "
                f"for tokens, ids up to {self.rows - 1}; save the model again after "
                "model.resize_token_embeddings(len(tokenizer)), or take the tokenizer that it was trained with"
            )


def of(config: ModelConfig, objective: Objective) -> Outline | None:
    """The outline of a model for an objective; None where only loading it, or the network, would tell: a hub id that is
    not in the local cache, a model that runs Python files of its own, or one that cannot be built without weights.

    Raises:
        ModelError: its configuration or tokenizer cannot be loaded, its folder has no safetensors weights, its
            architecture is no text classifier, or it is a packaged model that is not installed, without a network.
    """
    location = resolve(config.name)
    if config.trust_remote_code:  # its files are run when the run begins, which says so, and not before
        return None
    if Path(location).is_dir():
        _require_weights(config, Path(location))
        return _kept(config, objective, _files(Path(location)))
    snapshot = _snapshot(location, config.revision)
    if snapshot is None:
        if _offline() and (missing := not_installed(config.name)):
            raise missing
        return None
    pooling = KNOWN[config.name].pooling if config.pooling == "auto" and config.name in KNOWN else config.pooling
    local = config.model_copy(update={"name": str(snapshot), "revision": None, "pooling": pooling})
    try:
        return _kept(local, objective, _files(snapshot))
    except FedloraError:  # the snapshot may be incomplete; the run downloads what it lacks
        return None


def _require_weights(config: ModelConfig, folder: Path) -> None:
    if not any((folder / name).is_file() for name in (*_WEIGHTS, "adapter_config.json")):
        raise cannot_load(config, "weights", OSError(f"{folder} has no {_WEIGHTS[0]}"))


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _snapshot(hub_id: str, revision: str | None) -> Path | None:
    """The local copy of a hub id, without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except ValueError:  # no name that the hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def _files(folder: Path) -> FileStates:
    return limits.states(path for path in (*folder.glob("*"), *folder.glob("1_Pooling/*")) if path.suffix in _SMALL)


@remembered(16)
def _kept(config: ModelConfig, objective: Objective, files: FileStates) -> Outline | None:
    """The outline from the cache, or made and kept."""
    content = [_FORMAT, objective.name, config.pooling, config.attention, files, [version(name) for name in _DECIDING]]
    file = home.cache() / "outlines" / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]}.json"
    try:
        return _from_json(limits.read_json(file))
    except (OSError, ValueError, TypeError, KeyError):
        made = _make(config, objective)
    if made is not None:
        with suppress(RunFolderError):  # a home that cannot be written is told of where something must be
            write_json(file, asdict(made))
    return made


def _from_json(content: dict[str, Any]) -> Outline:
    content["layers"] = tuple(Layer(**layer) for layer in content["layers"])
    content["defaults"] = content["defaults"] and tuple(content["defaults"])
    return Outline(**content)


def _make(config: ModelConfig, objective: Objective) -> Outline | None:
    """Build the model without memory, and load its tokenizer."""
    declared = load_declared(config)
    tokenizer = load_tokenizer(config)
    bare = _bare(config, objective, declared)
    if bare is None:
        return None
    highest = _highest_token(tokenizer)
    return Outline(
        architecture=str(bare.config.model_type),
        layers=tuple(_layers(bare)),
        defaults=default_targets(bare.config.model_type),
        positions=positions_of(declared),
        rows=_rows(bare),
        highest_token=highest,
        token=str(tokenizer.convert_ids_to_tokens(highest)),
        checkpoints=bool(getattr(_body(bare), "supports_gradient_checkpointing", True)),
    )


def _bare(config: ModelConfig, objective: Objective, declared: Any) -> Any | None:
    """The network without its weights, or None for a class that needs them to be built."""
    import torch

    try:
        if config.attention not in ("auto", "flash_attention_2"):  # which `arithmetic.check` looks at
            declared._attn_implementation = config.attention
        with torch.device("meta"):
            return objective.bare(config, declared)
    except ModelError:
        raise
    except Exception as error:
        if config.attention != "auto" and "attention" in str(error).lower():
            raise ModelError(
                f"model.attention={config.attention} does not go with model.name={config.name}: {first_line(error)}; "
                "leave it out"
            ) from error
        if "Unrecognized configuration class" in str(error):
            raise cannot_load(config, "weights", error) from error
        return None


def _layers(model: Any) -> Iterator[Layer]:
    modules, there = dict(model.named_modules()), adaptable_modules(model)
    usual = ordinary(model, there)
    for name, module in there.items():
        first, second = module.weight.shape
        sides = (second, first) if stores_transposed(module) else (first, second)
        linear = not isinstance(module, nn.Embedding)
        yield Layer(name, *sides, linear=linear, tied=tied_to(modules, module), ordinary=name in usual)


def _body(model: Any) -> Any:
    return model.encoder if isinstance(model, PooledClassifier) else model


def _rows(model: Any) -> int | None:
    """Rows of the input embedding, where it is one of torch's."""
    try:
        embedding = _body(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return int(embedding.num_embeddings) if isinstance(embedding, nn.Embedding) else None


def _highest_token(tokenizer: Any) -> int:
    """The highest id that any text may bring: of an ordinary token, or of those that pad and frame texts.

    Tokens that were added and are none of these (`<image>`) matter only to a text that holds them.
    """
    added = set(getattr(tokenizer, "added_tokens_decoder", ()))
    ordinary = (index for index in tokenizer.get_vocab().values() if index not in added)
    frame: list[int] = []
    with suppress(Exception):  # of a tokenizer that takes no empty text, or no pairs, the texts themselves will tell
        frame += tokenizer("")["input_ids"]
        frame += tokenizer("", "")["input_ids"]
    special = [index for index in (tokenizer.pad_token_id, tokenizer.unk_token_id) if index is not None]
    return max((*ordinary, *frame, *special), default=0)
