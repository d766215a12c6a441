"""What every part of a configuration is built from."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


def words(value: Any) -> Any:
    """`query,value` on a command line means a list of two names."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


class Section(BaseModel):
    """Base of all parts of a configuration: unknown keys are errors, docstrings are help texts, values are frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, coerce_numbers_to_str=True
    )
