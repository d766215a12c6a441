"""`adapter_config.json` of an adapter from anyone: what PEFT needs of it, each value of its type, and nothing else.

PEFT takes module names for regular expressions, imports what a configuration names, and asks a hub for what it lacks.
So a configuration is never given to it as it came: keys are kept one by one, and modules are named as the file names
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from fedlora.errors import AdapterError
from fedlora.limits import clean, file_within, read_json, short
from fedlora.peftpattern import NAME

CONFIGURATION = "adapter_config.json"
TASKS = ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

Variant = Literal["lora", "rslora", "dora", "hira"]

_LONGEST_TEXT = 1000
_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Values of `init_lora_weights` with which PEFT alters the base weights, by rank, whenever it loads the adapter."""
_OTHER_KINDS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Settings of PEFT's with which a module's update is not just (alpha/r)·B·A of two matrices of the base model."""


def read_configuration(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter's folder: the keys that LoRA and HiRA need, checked; those set to null are left
    out.

    Raises:
        AdapterError: it cannot be read, says something that is not allowed, or is of another kind of adapter.
    """
    place = folder / CONFIGURATION
    try:
        content = read_json(file_within(folder, CONFIGURATION))
    except (OSError, ValueError) as error:
        reason = clean(getattr(error, "strerror", None) or str(error))
        raise AdapterError(f"{folder} is no PEFT adapter folder: {CONFIGURATION} cannot be read ({reason})") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{place} should hold keys and values")
    for key in _OTHER_KINDS:
        if content.get(key):
            raise AdapterError(f"{place}: {key} is set; adapters of this kind cannot be aggregated")
    _check_start(place, content.get("init_lora_weights"))
    hira = _method(place, content.get("peft_type")) == "HIRA"
    fields = _COMMON | (_OF_HIRA if hira else _OF_LORA)
    kept = {key: content[key] for key in fields if content.get(key) is not None}
    for key, value in kept.items():
        fits, expected = fields[key]
        if not fits(value):
            raise AdapterError(f"{place}: {key} is {short(value)}; expected {expected}")
    return kept


def variant_of(config: Mapping[str, Any]) -> Variant:
    """Which variant of LoRA a checked configuration is of."""
    if str(config["peft_type"]).upper() == "HIRA":
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
    if isinstance(value, str) and value.lower().startswith(_CHANGE_THE_BASE):
        raise AdapterError(
            f"{place}: init_lora_weights={short(value)} changes the base weights; convert the adapter to plain LoRA "
            "when saving it (PEFT: path_initial_model_for_weight_conversion)"
        )


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


_Field = tuple[Callable[[Any], bool], str]
_COMMON: dict[str, _Field] = {
    "peft_type": (_text, "LORA or HIRA"),
    "task_type": (lambda value: value in TASKS, f"one of {', '.join(TASKS)}"),
    "base_model_name_or_path": (_text, f"one line of at most {_LONGEST_TEXT} characters"),
    "revision": (_text, "one line of text"),
    "r": (_whole, "a whole number"),
    "target_modules": (_names_or_expression, "names of modules"),
    "exclude_modules": (_names_or_expression, "names of modules"),
    "modules_to_save": (_names, "names of modules"),
    "fan_in_fan_out": (_flag, "true or false"),
    "layers_to_transform": (lambda value: _whole(value) or _wholes(value), "numbers of layers"),
    "layers_pattern": (lambda value: isinstance(value, str | list), "names"),
    "rank_pattern": (_by_name(_whole), "whole numbers by module"),
}
_OF_HIRA: dict[str, _Field] = {"hira_dropout": (_number, "a number")}
_OF_LORA: dict[str, _Field] = {
    "lora_alpha": (_positive, "a positive number"),
    "alpha_pattern": (_by_name(_positive), "positive numbers by module"),
    "lora_dropout": (_number, "a number"),
    "use_rslora": (_flag, "true or false"),
    "use_dora": (_flag, "true or false"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "trainable_token_indices": (_tokens, "numbers of tokens"),
    "ensure_weight_tying": (_flag, "true or false"),
}
