"""How parameters look in the form of a deployment, and the settings of a run that have a field of their own there.

Prefect draws a JSON schema. A type `… | None` becomes tabs with "None" in front, so what may be left to the preset has
a schema of its own, without it: a choice has a word for that, and anything else is left empty (`left_empty`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from pydantic.json_schema import WithJsonSchema
from pydantic_core import MISSING

from fedlora.config import configfile
from fedlora.strategies import registry

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F")

AS_IN_PRESET = "as in the preset"
SETTINGS = {
    "strategy": "strategy",
    "options": "strategy_options",
    "data": "data.name",
    "text": "data.text",
    "label": "data.label",
    "model": "model.name",
    "rounds": "rounds",
    "clients": "clients",
    "fraction": "fraction",
    "partition": "partition.name",
    "alpha": "partition.alpha",
    "rank": "lora.rank",
    "ranks": "lora.ranks",
    "learning_rate": "training.learning_rate",
    "local_steps": "training.local_steps",
    "batch_size": "training.batch_size",
    "seed": "seed",
}
"""Parameters of the flow `federated` that are settings of a run, and their dotted keys."""
_HELP = {
    "options": "Options of the strategy, where they are choices; numbers go into overrides, for example "
    '{"strategy_options.ridge": 0.1}.',
    "alpha": "Of a Dirichlet partition: the smaller, the less alike the clients' labels (partition.alpha).",
    "ranks": "A rank for each client, 4,4,8; or shares of ranks, {4: 0.7, 16: 0.3}; or a rule, "
    "{low: 5, high: 20, share: 0.1} (lora.ranks).",
    "data": "A packaged data set, a csv, jsonl or parquet file on the worker, or a Hugging Face id (data.name).",
}
"""Where the key's own words would not do."""
_YAML = r"\.ya?ml$"
"""What is no name must be a file: Prefect refuses a mistyped name when the run is asked for, not when it runs."""


def settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among a flow's parameters that are not left to the preset, by dotted key.

    Raises:
        ConfigError: one cannot be read.
    """
    found: dict[str, Any] = {}
    for name, key in SETTINGS.items():
        value = parameters.get(name)
        if value is None or value in (AS_IN_PRESET, "", []):
            continue
        if name == "options":
            found |= configfile.parse_overrides(f"{key}.{each.rpartition(' ')[2]}" for each in value)
        elif name == "ranks" and isinstance(value, str):
            found |= configfile.parse_overrides([f"{key}={value}"])
        else:
            found[key] = value
    return found


def with_settings(flow: Callable[P, T]) -> Callable[..., T]:
    """A flow that takes, instead of its parameter `settings`, a parameter for each of `SETTINGS`."""
    whole = inspect.signature(flow, eval_str=True)

    @wraps(flow)
    def spread(*args: Any, **given: Any) -> T:
        flat = {name: given.pop(name) for name in SETTINGS if name in given}
        return flow(*args, **given, settings=settings(flat))  # type: ignore[arg-type]

    parameters: list[inspect.Parameter] = []
    for each in whole.parameters.values():
        parameters += map(_parameter, SETTINGS) if each.name == "settings" else [each]
    keyword = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    spread.__signature__ = whole.replace(parameters=keyword)  # type: ignore[attr-defined]
    return spread


def _parameter(name: str) -> inspect.Parameter:
    field = configfile.field(SETTINGS[name])
    schema = {**_schema(name, field), "description": _HELP.get(name) or _described(name, field)}
    kind: Any = field.annotation
    if name in ("options", "ranks"):
        kind = list[str] if name == "options" else str | list[int] | dict[Any, Any]  # `prefect … -p` reads 4,4,8 itself
    elif get_origin(kind) is Literal or name == "strategy":
        kind = Literal[tuple(schema["enum"])]
    annotation: Any = Annotated[kind | None, *field.metadata, WithJsonSchema(schema)]
    default = AS_IN_PRESET if schema.get("enum") else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _schema(name: str, field: FieldInfo) -> dict[str, Any]:
    """Of a value that is set; none of it is filled in beforehand."""
    if name == "strategy":
        return _one_of(registry.names())
    if name == "options":
        return {"type": "array", "uniqueItems": True, "items": {"type": "string", "enum": _options()}}
    if name == "ranks":
        return {"type": "string"}
    if get_origin(field.annotation) is Literal:
        return _one_of(get_args(field.annotation))
    limited: Any = Annotated[field.annotation, *field.metadata, field.description]
    schema = TypeAdapter(limited).json_schema()
    return next((each for each in schema.get("anyOf", []) if each.get("type") != "null"), schema)


def _described(name: str, field: FieldInfo) -> str:
    words, key = " ".join((field.description or "").split()).removesuffix("."), SETTINGS[name]
    return f"{words} ({key})." if "." in key else f"{words}."


def _options() -> list[str]:
    """`flora-na solver=adam`: every choice among the options of a strategy that is not its default."""
    found = []
    for strategy in registry.names():
        for option, field in registry.find(strategy).Options.model_fields.items():
            values = ("true", "false") if field.annotation is bool else get_args(field.annotation)
            usual = str(field.default).lower() if field.annotation is bool else field.default
            found += [f"{strategy} {option}={value}" for value in values if isinstance(value, str) and value != usual]
    return found


def left_empty(flow: F) -> F:
    """A flow whose fields are empty where its parameters are None.

    With a null as default, the first of Prefect's UIs draws no field for it, and the second sends the null back, which
    the server refuses. So the schema, which is made of this signature, has no default for it; calls are as they were.
    """
    found = inspect.signature(flow, eval_str=True)  # type: ignore[arg-type]
    empty = [each.replace(default=MISSING) if each.default is None else each for each in found.parameters.values()]
    flow.__signature__ = found.replace(parameters=empty)  # type: ignore[attr-defined]
    return flow


def name_or_file(names: Sequence[str], title: str) -> WithJsonSchema:
    """A drop-down of names, and a second tab to write the path of a YAML file."""
    return WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": list(names), "title": title},
                {"type": "string", "title": "YAML file", "pattern": _YAML},
            ]
        }
    )


def empty(kind: str, **limits: Any) -> WithJsonSchema:
    """A field of a JSON type that may be left empty."""
    return WithJsonSchema({"type": kind, **limits})


def _one_of(names: Sequence[str]) -> dict[str, Any]:
    return {"type": "string", "enum": [AS_IN_PRESET, *names]}
