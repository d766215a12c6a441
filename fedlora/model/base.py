"""The frozen base model: names, loading, heads, and which layers an adapter is put on.

Base models are sequence classifiers: the architecture's own head, or, for sentence encoders, the pooling that they were
trained with and a fresh linear classifier (with the wrong pooling federated runs hardly learn).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora import seeds
from fedlora.config import ModelConfig
from fedlora.config.lora import LoraConfig
from fedlora.errors import ModelError, did_you_mean, first_line
from fedlora.model import peftpattern
from fedlora.model.heads import PooledClassifier, head_modules, load_classifier
from fedlora.model.known import KNOWN, not_installed, resolve

_OFFSET_POSITIONS = {"roberta", "camembert", "data2vec", "esm", "ibert", "lilt", "longformer", "luke", "mpnet", "xmod"}
"""Words in the names of architectures that count positions from the padding token's id + 1 (xlm-roberta too)."""


def pooling_of(config: ModelConfig) -> str:
    """`mean`, `cls` or `head`: the configured pooling, or for `auto` the one that the model declares.

    Sentence encoders declare it in `1_Pooling/config.json` (the layout of sentence-transformers).
    """
    if config.pooling != "auto":
        return config.pooling
    if config.name in KNOWN:
        return KNOWN[config.name].pooling
    declared = model_file(resolve(config.name), "1_Pooling/config.json", config.revision)
    if declared is None:
        return "head"
    content = json.loads(Path(declared).read_text("utf-8"))
    if content.get("pooling_mode_mean_tokens"):
        return "mean"
    if content.get("pooling_mode_cls_token"):
        return "cls"
    raise ModelError(f"model.name={config.name} declares a pooling other than mean or cls; set model.pooling yourself")


def model_file(location: str, name: str, revision: str | None) -> str | None:
    """A file of a model, from its folder, the cache or the hub; None where there is none."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        location,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return str(found) if found else None


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer; a decoder without padding token pads with its end token.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(config.name), **_source(config))
    except Exception as error:
        raise cannot_load(config, "tokenizer", error) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # Transformers makes one up from nothing
        raise ModelError(
            f"model.name={config.name}: its tokenizer has no words; the model's folder needs the tokenizer's files too "
            "(tokenizer.json)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_length(config: ModelConfig, tokens: int) -> None:
    """Refuse texts of more tokens than the model has positions for; a model that declares no limit takes any length.

    Raises:
        ModelError: `tokens` is above the limit, or the model's configuration cannot be loaded.
    """
    check_positions(config, positions_of(load_declared(config)), tokens)


def load_declared(config: ModelConfig) -> Any:
    """What the model's `config.json` says, as Transformers understands it.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve(config.name), **_source(config))
    except Exception as error:
        raise cannot_load(config, "configuration", error) from error


def positions_of(declared: Any) -> int | None:
    """Most tokens that a model reads, by its configuration; None where it declares no limit."""
    text = declared.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or 0
    if positions > 0 and _OFFSET_POSITIONS & set(text.model_type.split("-")):
        positions -= (text.pad_token_id or 0) + 1
    return positions if positions > 0 else None


def check_positions(config: ModelConfig, positions: int | None, tokens: int, written: int = 0) -> None:
    """Raise what `check_length` does, for a limit that is known, and for an answer of so many tokens."""
    if positions is not None and positions < tokens + written and written:
        raise ModelError(
            f"data.max_length={tokens} and evaluation.generate.max_new_tokens={written} are {tokens + written} tokens "
            f"together, but model.name={config.name} reads at most {positions}; lower one of them"
        )
    if positions is not None and positions < tokens:
        raise ModelError(
            f"data.max_length={tokens}, but model.name={config.name} reads at most {positions} tokens; "
            f"set data.max_length to {positions} or less"
        )


def load_base(config: ModelConfig, labels: Sequence[str], pad_token_id: int | None = None, seed: int = 0) -> nn.Module:
    """A classifier over `labels` on the pre-trained weights, with a fresh head drawn by `seed`; a checkpoint that is a
    classifier of the same names keeps its head, with the rows in our order (`fedlora.model.heads`).

    Weights are read from safetensors only. The base is in the configured precision, the head in fp32.

    Raises:
        ModelError: it cannot be loaded (not there, no network, no safetensors, not a text model).
    """
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    location, pooling = resolve(config.name), pooling_of(config)
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    seeds.seed_torch(seed, "head")
    common: dict[str, Any] = {**_source(config), "dtype": dtype, "use_safetensors": True}
    try:
        if pooling != "head":
            return PooledClassifier(AutoModel.from_pretrained(location, **common), len(labels), pooling)
        declared = AutoConfig.from_pretrained(location, **_source(config))
        model: Any = load_classifier(AutoModelForSequenceClassification, location, declared, labels, seed, **common)
    except ModelError:
        raise
    except Exception as error:
        raise cannot_load(config, "weights", error) from error
    if pad_token_id is not None:  # whatever the model declares: a decoder finds the last token of a text by it
        model.config.pad_token_id = pad_token_id
    for name in head_modules(model):
        model.get_submodule(name).float().register_forward_pre_hook(_to_its_precision)
    classifier: nn.Module = model
    return classifier


def load_writer(config: ModelConfig) -> nn.Module:
    """A network that predicts the next token, on the pre-trained weights, in the configured precision.

    Weights are read from safetensors only.

    Raises:
        ModelError: it cannot be loaded, or is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    check_writer(config, load_declared(config))
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    try:
        network: nn.Module = AutoModelForCausalLM.from_pretrained(
            resolve(config.name), **_source(config), dtype=dtype, use_safetensors=True
        )
    except Exception as error:
        raise cannot_load(config, "weights", error) from error
    return network


def check_writer(config: ModelConfig, declared: Any) -> None:
    """Refuse a model that was not trained to predict the next token.

    Raises:
        ModelError: its configuration says so.
    """
    classes = [str(name) for name in declared.architectures or ()]
    if classes and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in classes):
        raise ModelError(
            f"model.name={config.name} is a {classes[0]}, which does not write; task=generation needs a causal "
            "language model (…ForCausalLM), like HuggingFaceTB/SmolLM2-135M-Instruct"
        )


def _to_its_precision(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(value.to(dtype) if torch.is_tensor(value) else value for value in inputs)


def _source(config: ModelConfig) -> dict[str, Any]:
    """What every load is told. Not left out where false: Transformers would then ask on the terminal."""
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def cannot_load(config: ModelConfig, what: str, error: Exception) -> ModelError:
    """Why a part of a model (`what`) cannot be had, as an error to raise."""
    if "trust_remote_code" in str(error):
        return ModelError(
            f"model.name={config.name} needs Python files that come with it, which are not run; read them, then set "
            "model.trust_remote_code=true, which runs them with all your rights (and model.revision to what you read), "
            "or choose a model that Transformers knows"
        )
    return not_installed(config.name) or ModelError(
        f"model.name={config.name}: its {what} cannot be loaded: {first_line(error)} "
        "(expected a packaged name, a folder, or a reachable Hugging Face id, with safetensors weights)"
    )


def target_modules(model: Any, lora: LoraConfig) -> list[str]:
    """The configured target modules, or PEFT's choice for the architecture, or its query and value projections.

    Raises:
        ModelError: nothing matches, or there is nothing to choose by; the layers that can be adapted are listed.
    """
    architecture = model.config.model_type
    return targets_among(adaptable_modules(model), architecture, default_targets(architecture), lora)


def adaptable_modules(model: Any) -> list[str]:
    """Names of the modules that an adapter can be put on: linear layers and embeddings outside the head."""
    head = tuple(head_modules(model))
    return [name for name, module in model.named_modules() if _adaptable(module) and not name.startswith(head)]


def default_targets(architecture: str) -> tuple[str, ...] | None:
    """What PEFT adapts in an architecture where nothing is said; None where it has no choice."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    found = DEFAULTS.get(architecture)
    return tuple(found) if found else None


def targets_among(
    adaptable: Sequence[str], architecture: str, defaults: Sequence[str] | None, lora: LoraConfig
) -> list[str]:
    """The target modules among these of an architecture, where PEFT would take `defaults`.

    Raises:
        ModelError: as `target_modules`.
    """
    endings = sorted({name.rsplit(".", 1)[-1] for name in adaptable})
    wanted = lora.target_modules or defaults or _query_and_value(endings)
    if wanted is None:
        raise ModelError(
            f"no default lora.target_modules for architecture '{architecture}'; choose among: {', '.join(endings)}"
        )
    for target in wanted:
        if not any(peftpattern.chooses(target, name) for name in adaptable):
            raise ModelError(
                f"lora.target_modules: '{target}' matches no linear layer or embedding of the model."
                f"{did_you_mean(target, endings)} There are: {', '.join(endings)}."
            )
    return list(wanted)


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
