"""How parameters look in the form of a deployment: a drop-down where there is a choice.

Prefect draws a JSON schema. A type `… | None` becomes two tabs with "None" in front, which hides the choices, so a
choice that may be left to the preset has a word for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import WithJsonSchema

AS_IN_PRESET = "as in the preset"
SETTINGS = ("strategy", "rounds", "clients", "fraction", "seed")
"""Parameters of the flow `federated` that are settings of the run."""
_YAML = r"\.ya?ml$"
"""What is no name must be a file: Prefect refuses a mistyped name when the run is asked for, not when it runs."""


def settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among a flow's parameters that are not left to the preset."""
    return {key: parameters[key] for key in SETTINGS if parameters.get(key) not in (None, AS_IN_PRESET)}


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
