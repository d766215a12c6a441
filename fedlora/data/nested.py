"""Columns inside of columns, by dotted paths: `task.question`, `turns.0.text`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def value(row: Mapping[str, Any], path: str) -> Any:
    """What a row holds there; None where something on the way is missing. A column of that whole name comes first."""
    if path in row:
        return row[path]
    found: Any = row
    for step in path.split("."):
        if isinstance(found, Mapping):
            found = found.get(step)
        elif isinstance(found, list) and step.isdecimal():
            found = found[int(step)] if int(step) < len(found) else None
        else:
            return None
    return found


def has(schema: pa.Schema, path: str) -> bool:
    """Whether a table has such a column, or may have: how long a list is only its rows tell."""
    import pyarrow as pa

    if path in schema.names:
        return True
    first, *steps = path.split(".")
    if schema.names.count(first) != 1:
        return False
    kind = schema.field(first).type
    for step in steps:
        if pa.types.is_struct(kind) and kind.get_field_index(step) >= 0:
            kind = kind.field(step).type
        elif _is_list(kind) and step.isdecimal():
            kind = kind.value_type
        else:
            return False
    return True


def names(schema: pa.Schema) -> str:
    """The columns of a table for a person, nested ones by their paths."""
    return ", ".join(path for field in schema for path in _paths(field.name, field.type))


def _paths(name: str, kind: pa.DataType) -> list[str]:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return [path for field in kind for path in _paths(f"{name}.{field.name}", field.type)]
    if _is_list(kind) and pa.types.is_struct(kind.value_type):
        return [path for field in kind.value_type for path in _paths(f"{name}.0.{field.name}", field.type)]
    return [name]


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))
