"""Which layers of a model an adapter is put on, and which it cannot be put on."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from fedlora.config.lora import ALL_LINEAR, LoraConfig
from fedlora.errors import ModelError, did_you_mean
from fedlora.model import peftlibrary, peftpattern
from fedlora.model.heads import head_modules


class Candidates(NamedTuple):
    """What an adapter can be put on in a model."""

    names: Sequence[str]
    """Linear layers and embeddings outside the head."""
    linear: Collection[str]
    """Those of them that `all-linear` means: no embeddings, and not the layer that puts out the next token."""
    architecture: str
    defaults: Sequence[str] | None
    """What PEFT adapts where nothing is said; None where it has no choice."""

    @property
    def endings(self) -> list[str]:
        """The last words of the names."""
        return sorted({name.rsplit(".", 1)[-1] for name in self.names})


def target_modules(model: Any, lora: LoraConfig) -> list[str]:
    """What PEFT is told: the configured names, or PEFT's choice for the architecture, or its query and value
    projections; where more than that is said, the full names of the modules that this chooses.

    Raises:
        ModelError: nothing matches, or there is nothing to choose by; the layers that can be adapted are listed.
    """
    there, architecture = adaptable_modules(model), model.config.model_type
    found = Candidates(list(there), ordinary(model, there), architecture, default_targets(architecture))
    chosen = choose(found, lora)
    if isinstance(lora.target_modules, str) or lora.exclude_modules:
        return chosen
    return _names(found, lora)


def choose(found: Candidates, lora: LoraConfig) -> list[str]:
    """The full names of the modules that a configuration chooses.

    Raises:
        ModelError: as `target_modules`.
    """
    if lora.target_modules == ALL_LINEAR:
        chosen = [name for name in found.names if name in found.linear]
    else:
        wanted = lora.target_modules if isinstance(lora.target_modules, str) else _names(found, lora)
        chosen = _matching("target_modules", wanted, found)
    left_out = set(_matching("exclude_modules", lora.exclude_modules, found)) if lora.exclude_modules else set()
    if not (kept := [name for name in chosen if name not in left_out]):
        raise ModelError(
            f"lora.exclude_modules leaves nothing of lora.target_modules: all {len(chosen)} modules are excluded; "
            "exclude fewer"
        )
    return kept


def _names(found: Candidates, lora: LoraConfig) -> list[str]:
    wanted = lora.target_modules or found.defaults or _query_and_value(found.endings)
    if wanted is None:
        raise ModelError(
            f"no default lora.target_modules for architecture '{found.architecture}'; choose among: "
            f"{', '.join(found.endings)}"
        )
    return list(wanted)


def _matching(key: str, wanted: Sequence[str] | str, found: Candidates) -> list[str]:
    """The modules that names, or an expression for the whole name, choose; each must choose one."""
    if isinstance(wanted, str):
        chosen = [name for name in found.names if re.fullmatch(wanted, name)]
        if not chosen:
            raise ModelError(
                f"lora.{key}: the expression '{wanted}' matches the whole name of no linear layer or embedding of the "
                f"model, such as {found.names[0]}; its last words are: {', '.join(found.endings)}"
            )
        return chosen
    for target in wanted:
        if not any(peftpattern.chooses(target, name) for name in found.names):
            raise ModelError(
                f"lora.{key}: '{target}' matches no linear layer or embedding of the model."
                f"{did_you_mean(target, found.endings)} There are: {', '.join(found.endings)}."
            )
    return [name for name in found.names if any(peftpattern.chooses(target, name) for target in wanted)]


def adaptable_modules(model: Any) -> dict[str, Any]:
    """The modules that an adapter can be put on: linear layers and embeddings outside the head."""
    head = tuple(head_modules(model))
    return {name: each for name, each in model.named_modules() if _adaptable(each) and not name.startswith(head)}


def ordinary(model: Any, adaptable: Mapping[str, Any]) -> set[str]:
    """The names of the adaptable modules that `all-linear` means, as PEFT has it."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {name for name, each in adaptable.items() if not isinstance(each, nn.Embedding) and each is not output}


def default_targets(architecture: str) -> tuple[str, ...] | None:
    """What PEFT adapts in an architecture where nothing is said; None where it has no choice."""
    defaults = peftlibrary.load().utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    found = defaults.get(architecture)
    return tuple(found) if found else None


def check_sides(lora: LoraConfig, module: str, shape: tuple[int, int]) -> None:
    """Refuse a rank that is above the smaller side of a module's weight (d_out × d_in).

    Raises:
        ModelError: it is.
    """
    key, rank = ("lora.ranks", lora.highest_rank) if lora.ranks else ("lora.rank", lora.rank)
    if rank > min(shape):
        raise ModelError(
            f"{key}={rank} is above the smaller side of module '{module}' ({shape[0]} × {shape[1]}); choose a rank of "
            f"at most {min(shape)}"
        )


def no_place_for_core(module: str) -> ModelError:
    """Why a strategy that trains a matrix between A and B cannot adapt a module, as an error to raise."""
    return ModelError(f"module '{module}' is no linear layer, and only these can have a core between A and B")


def tied_to(layers: Mapping[str, nn.Module], layer: nn.Module, apart: Collection[int] = ()) -> str | None:
    """The name of another module with the same weight as `layer`; modules in `apart` (by `id`) do not count."""
    weight = layer._parameters.get("weight")
    if weight is None:  # it hands on that of a layer within it, or has weights by other names
        return None
    others = (
        name
        for name, other in layers.items()
        if other is not layer and id(other) not in apart and other._parameters.get("weight") is weight
    )
    return next(others, None)


def would_change_both(module: str, tied: str) -> ModelError:
    """Why a strategy that changes the base cannot adapt a module whose weight is another's too, as an error."""
    return ModelError(
        f"lora.target_modules: '{module}' shares its weight with '{tied}', and the strategy changes the weights of the "
        "base, which would change both; leave it out of lora.target_modules, untie them in the base model, or choose "
        "a strategy that leaves the base alone"
    )


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or stores_transposed(module)


def only_conv1d(model: Any, targets: Sequence[str]) -> bool:
    """Whether all modules that `targets` name are GPT-2's Conv1D."""
    named = (
        module
        for name, module in model.named_modules()
        if _adaptable(module) and any(peftpattern.chooses(target, name) for target in targets)
    )
    return all(type(module).__name__ == "Conv1D" for module in named)


def stores_transposed(module: nn.Module) -> bool:
    """Whether a layer's weight is d_in × d_out: GPT-2's Conv1D, and embeddings (vocabulary × width)."""
    return type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)


_QUERY_AND_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("q", "v"), ("Wqkv",), ("c_attn",))
"""What the projections that LoRA usually adapts are called, for architectures that PEFT has no choice for."""


def _query_and_value(endings: Sequence[str]) -> list[str] | None:
    return next((list(names) for names in _QUERY_AND_VALUE if set(names) <= set(endings)), None)
