"""`adapter_config.json` of an adapter from anyone: what PEFT needs of it, each value of its type, and nothing else.

PEFT takes module names for regular expressions, imports what a configuration names, and asks a hub for what it lacks.
So a configuration is never given to it as it came: keys are kept one by one, and modules are named as the file names
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedlora.errors import AdapterError
from fedlora.files.limits import clean, file_within, read_json, short
from fedlora.model.peftpattern import NAME

CONFIGURATION = "adapter_config.json"
TASKS = ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

Variant = Literal["lora", "rslora", "dora", "hira"]

_LONGEST_TEXT = 1000
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Values of `init_lora_weights` with which PEFT alters the base weights, by rank, whenever it loads the adapter."""
_NOT_CONVERTED = ("loftq",)
"""Those of them that PEFT does not turn into plain LoRA when saving."""


class Treatment(StrEnum):
    """What is done about a key when adapters are aggregated."""

    AGREE = "must agree"
    ALIGN = "align"
    IRRELEVANT = "irrelevant"
    REFUSE = "refuse"


class Key(NamedTuple):
    """A key of PEFT's configuration: what is done about it and why; a key with `fits` is kept, when that says yes."""

    treatment: Treatment
    reason: str
    fits: Callable[[Any], bool] | None = None
    expected: str = ""
    default: Any = None
    """What PEFT takes where a configuration does not say; None where that is no value of its own."""


def read_configuration(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter's folder: the keys that LoRA and HiRA need, checked; those set to null are left
    out.

    Raises:
        AdapterError: it cannot be read, says something that is not allowed, or is of another kind of adapter.
    """
    return read_with_notes(folder)[0]


def read_with_notes(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """As `read_configuration`, and the keys that are set but that no PEFT known here has: they may be of a newer one.

    Raises:
        AdapterError: as `read_configuration`.
    """
    place = folder / CONFIGURATION
    try:
        content = read_json(file_within(folder, CONFIGURATION))
    except (OSError, ValueError) as error:
        reason = clean(getattr(error, "strerror", None) or str(error))
        raise AdapterError(f"{folder} is no PEFT adapter folder: {CONFIGURATION} cannot be read ({reason})") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{place} should hold keys and values")
    keys = KEYS[_method(place, content.get("peft_type"))]
    for key, known in keys.items():
        if known.treatment is Treatment.REFUSE and key != "init_lora_weights" and content.get(key):
            raise AdapterError(f"{place}: {key} is set ({known.reason}); such adapters cannot be aggregated")
    _check_start(place, content.get("init_lora_weights"))
    kept = {key: content[key] for key, known in keys.items() if known.fits and content.get(key) is not None}
    for key, value in kept.items():
        fits, expected = keys[key].fits, keys[key].expected
        if fits and not fits(value):
            raise AdapterError(f"{place}: {key} is {short(value)}; expected {expected}")
    kept["peft_type"] = kept["peft_type"].upper()  # PEFT knows no other spelling
    return kept, tuple(short(key) for key, value in content.items() if value and key not in keys)


def variant_of(config: Mapping[str, Any]) -> Variant:
    """Which variant of LoRA a checked configuration is of."""
    if config["peft_type"] == "HIRA":
        return "hira"
    if config.get("use_dora"):
        return "dora"
    return "rslora" if config.get("use_rslora") else "lora"


def _method(place: Path, value: Any) -> str:
    kind = value.upper() if isinstance(value, str) else ""
    if kind not in ("LORA", "HIRA"):
        raise AdapterError(f"{place}: peft_type is {short(value)}; expected LORA or HIRA")
    return kind


def _check_start(place: Path, value: Any) -> None:
    """Refuse an adapter that is no difference to the base that its configuration names, and say how it becomes one."""
    if not (isinstance(value, str) and value.lower().startswith(_CHANGE_THE_BASE)):
        return
    way = (
        "save it as plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion, the folder of the "
        "adapter as it was before training)"
    )
    if value.lower().startswith(_NOT_CONVERTED):
        way = (
            "PEFT does not convert it; save the base that it changed as well (model.unload().save_pretrained), and in "
            f"{CONFIGURATION} set init_lora_weights to true and base_model_name_or_path to that base"
        )
    raise AdapterError(f"{place}: init_lora_weights={short(value)} changes the base weights; {way}")


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST_TEXT


def _name(value: Any) -> bool:
    return _text(value) and NAME.fullmatch(value) is not None


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_name, value))


def _names_or_expression(value: Any) -> bool:
    """An expression is never used: the adapter's file says which modules it has."""
    return isinstance(value, str) or (isinstance(value, list) and all(map(_text, value)))


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _number(value: Any) -> bool:
    """A float has room for it."""
    return type(value) in (int, float) and abs(value) < 1e30


def _positive(value: Any) -> bool:
    return _number(value) and value > 1e-30 and math.isfinite(value)


def _wholes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _by_name(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def _tokens(value: Any) -> bool:
    return _wholes(value) or (_by_name(_wholes)(value) and all(map(_name, value)))


_AGREE, _ALIGN, _IRRELEVANT, _REFUSE = Treatment
_BY_NAMES = "the tensors' names say which modules these are: clients need the same ones, and the result names them"
_START = "only how PEFT draws the start"
_BESIDE = "PEFT reads it beside another key alone, and that one is refused"

_COMMON: dict[str, Key] = {
    "peft_type": Key(_AGREE, "LoRA adds B·A, HiRA multiplies the base with it", _text, "LORA or HIRA"),
    "task_type": Key(
        _AGREE,
        "the class of the model that the names are of; one without it goes with any",
        lambda value: value in TASKS,
        f"one of {', '.join(TASKS)}",
    ),
    "base_model_name_or_path": Key(
        _IRRELEVANT,
        "the same model has another path on another machine; noted where it differs",
        _text,
        f"one line of at most {_LONGEST_TEXT} characters",
    ),
    "revision": Key(_IRRELEVANT, "as the base model's name; noted where it differs", _text, "one line of text"),
    "r": Key(_ALIGN, "the strategy says how ranks meet", _whole, "a whole number"),
    "target_modules": Key(_ALIGN, _BY_NAMES, _names_or_expression, "names of modules"),
    "exclude_modules": Key(_ALIGN, _BY_NAMES, _names_or_expression, "names of modules"),
    "modules_to_save": Key(_ALIGN, _BY_NAMES, _names, "names of modules"),
    "fan_in_fan_out": Key(_AGREE, "which side of a weight B·A is for", _flag, "true or false", False),
    "layers_to_transform": Key(_ALIGN, _BY_NAMES, lambda value: _whole(value) or _wholes(value), "numbers of layers"),
    "layers_pattern": Key(_ALIGN, _BY_NAMES, lambda value: isinstance(value, str | list), "names"),
    "rank_pattern": Key(_ALIGN, "as r, module by module", _by_name(_whole), "whole numbers by module"),
    "auto_mapping": Key(_IRRELEVANT, "names classes to import, which nobody does for a stranger"),
    "peft_version": Key(_IRRELEVANT, "who wrote it"),
    "inference_mode": Key(_IRRELEVANT, "whether it is trained on; the result says that it is not"),
}
_OF_HIRA: dict[str, Key] = {
    "hira_dropout": Key(_IRRELEVANT, "training alone", _number, "a number"),
    "init_weights": Key(_IRRELEVANT, _START),
}
_OF_LORA: dict[str, Key] = {
    "lora_alpha": Key(_ALIGN, "alpha/r is folded into B where that is exact", _positive, "a positive number"),
    "alpha_pattern": Key(_ALIGN, "as lora_alpha, module by module", _by_name(_positive), "positive numbers by module"),
    "use_rslora": Key(_ALIGN, "only another alpha/r, alpha/√r", _flag, "true or false"),
    "use_dora": Key(_AGREE, "magnitudes beside B·A", _flag, "true or false", False),
    "lora_dropout": Key(_IRRELEVANT, "training alone", _number, "a number"),
    "bias": Key(
        _AGREE,
        "which biases are in the file",
        lambda value: value in ("none", "all", "lora_only"),
        "none, all or lora_only",
        "none",
    ),
    "trainable_token_indices": Key(
        _ALIGN,
        "rows are matched by token; a row that a client has not is that of the base",
        _tokens,
        "numbers of tokens",
    ),
    "ensure_weight_tying": Key(_AGREE, "whether one tensor stands for two tied modules", _flag, "true or false", False),
    "init_lora_weights": Key(
        _REFUSE, f"starts that change the base ({', '.join(_CHANGE_THE_BASE)}); others leave no trace"
    ),
    "loftq_config": Key(_IRRELEVANT, _BESIDE),
    "corda_config": Key(_IRRELEVANT, _BESIDE),
    "lora_ga_config": Key(_IRRELEVANT, _BESIDE),
    "eva_config": Key(_IRRELEVANT, _START),
    "qalora_group_size": Key(_IRRELEVANT, _BESIDE),
    "megatron_core": Key(_IRRELEVANT, "a module to import, for Megatron's layers"),
    "runtime_config": Key(_IRRELEVANT, "how PEFT uses memory"),
    "megatron_config": Key(_IRRELEVANT, "how Megatron's layers are made; the factors are the same"),
    "alora_invocation_tokens": Key(_REFUSE, "the adapter counts for some tokens of a text alone"),
    "arrow_config": Key(_REFUSE, "a router chooses among adapters"),
    "kasa_config": Key(_REFUSE, "a trained diagonal between A and B, and another base"),
    "layer_replication": Key(_REFUSE, "the model has layers that its base has not"),
    "lora_bias": Key(_REFUSE, "a bias beside B"),
    "monteclora_config": Key(_REFUSE, "A is drawn at random"),
    "target_parameters": Key(_REFUSE, "factors of parameters that are no module's weight"),
    "use_bdlora": Key(_REFUSE, "factors of blocks"),
    "use_qalora": Key(_REFUSE, "A is for pooled inputs"),
    "velora_config": Key(_REFUSE, "gradients of another kind"),
}
KEYS: dict[str, dict[str, Key]] = {"LORA": _COMMON | _OF_LORA, "HIRA": _COMMON | _OF_HIRA}
"""Every key of PEFT's configurations of both methods; a test compares them with the PEFT that is installed."""
