"""How parameters look in the form of a deployment: a drop-down where there is a choice.

Prefect draws a JSON schema. A type `… | None` becomes two tabs with "None" in front, which hides the choices, so a
choice that may be left to the preset has a word for that.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic.json_schema import WithJsonSchema

AS_IN_PRESET = "as in the preset"
_YAML = r"\.ya?ml$"
"""What is no name must be a file: Prefect refuses a mistyped name when the run is asked for, not when it runs."""


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


def one_of(names: Sequence[str]) -> WithJsonSchema:
    """A drop-down of names, with `AS_IN_PRESET` first."""
    return WithJsonSchema({"type": "string", "enum": [AS_IN_PRESET, *names]})
