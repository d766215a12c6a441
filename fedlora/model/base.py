"""The frozen base model: loading, heads, and how many tokens it reads.

Base models are sequence classifiers: the architecture's own head, or, for sentence encoders, the pooling that they were
trained with and a fresh linear classifier (with the wrong pooling federated runs hardly learn).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora import seeds
from fedlora.config import ModelConfig
from fedlora.errors import ModelError, first_line
from fedlora.model import arithmetic
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
    seeds.seed_torch(seed, "head")
    common: dict[str, Any] = {**_source(config), "use_safetensors": True}
    try:
        if pooling != "head":
            body = AutoModel.from_pretrained(location, **common, **arithmetic.loading(config))
            return arithmetic.trained_as_scored(PooledClassifier(body, len(labels), pooling))
        declared = AutoConfig.from_pretrained(location, **_source(config))
        heads = _heads(declared) if config.quantization != "none" else ()
        common |= arithmetic.loading(config, heads)
        model: Any = load_classifier(AutoModelForSequenceClassification, location, declared, labels, seed, **common)
    except ModelError:
        raise
    except Exception as error:
        raise cannot_load(config, "weights", error) from error
    if pad_token_id is not None:  # whatever the model declares: a decoder finds the last token of a text by it
        model.config.pad_token_id = pad_token_id
    for name in head_modules(model):
        model.get_submodule(name).float().register_forward_pre_hook(_to_its_precision)
    classifier: nn.Module = arithmetic.trained_as_scored(model)
    return classifier


def _heads(declared: Any) -> list[str]:
    """The modules of a classifier's head, which is trained and therefore never quantised."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        return head_modules(AutoModelForSequenceClassification.from_config(declared))


def load_writer(config: ModelConfig) -> nn.Module:
    """A network that predicts the next token, on the pre-trained weights, in the configured precision.

    Weights are read from safetensors only.

    Raises:
        ModelError: it cannot be loaded, or is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    check_writer(config, load_declared(config))
    how = {**_source(config), **arithmetic.loading(config), "use_safetensors": True}
    try:
        network: nn.Module = AutoModelForCausalLM.from_pretrained(resolve(config.name), **how)
    except Exception as error:
        raise cannot_load(config, "weights", error) from error
    return arithmetic.trained_as_scored(network)


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
