"""A configuration read back from the parameters that a run was logged with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedlora.config import configfile
from fedlora.config.run import RunConfig
from fedlora.sections import Section


def recalled(told: Mapping[str, str]) -> RunConfig:
    """The configuration that parameters tell of, as far as it goes.

    Nothing is checked, and what this version does not know is left out: a run of another version, or of a plug-in that
    is not installed here, can be read, too. A key without a value has its default.

    Args:
        told: values by dotted key: text as it is, everything else as JSON.
    """
    known = set(configfile.dotted_keys())
    values = {key: value for key, text in told.items() if key in known for value in _read(key, text)}
    return RunConfig.model_construct(**_made(RunConfig, configfile.nest(values)))


def _read(key: str, text: str) -> Iterator[Any]:
    """The value in a key's type; nothing where it is not of it."""
    for read in (_type(key).validate_python, _type(key).validate_json):
        try:
            yield read(text)
            return
        except ValidationError:
            continue


@cache
def _type(key: str) -> TypeAdapter[Any]:
    kind: Any = configfile.field(key).annotation
    return TypeAdapter(kind)


def _made(section: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with its sections as such."""
    found = dict(values)
    for name, value in values.items():
        kind = section.model_fields[name].annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found[name] = kind.model_construct(**_made(kind, value))
    return found
