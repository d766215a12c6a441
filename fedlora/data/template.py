"""What is asked, written by a template of the user's (Jinja, in its sandbox) from the columns of a row."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fedlora.errors import DataError, did_you_mean

ROW = "row"
"""The whole row, for columns whose names are none in Jinja."""


class Template:
    """Writes a row as text: the columns are names, and `row` is all of them. An empty cell is nothing.

    Raises:
        DataError: it is no template, or names what is no column.
    """

    def __init__(self, text: str, columns: Collection[str], where: str) -> None:
        self._environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, finalize=lambda value: "" if value is None else value, autoescape=False
        )
        try:
            named = meta.find_undeclared_variables(self._environment.parse(text))
            self._template = self._environment.from_string(text)
        except TemplateError as error:
            raise DataError(f"data.template cannot be read: {_one_line(error)} (in {text[:60]!r})") from error
        missing = sorted(named - {*columns, ROW, *self._environment.globals})
        if missing:
            raise DataError(
                f"data.template names {missing[0]!r}, which is no column of {where}."
                f"{did_you_mean(missing[0], columns)} Its columns are: {', '.join(columns)}"
            )

    def __call__(self, row: Mapping[str, Any]) -> str:
        """The text of a row.

        Raises:
            DataError: the template does not go with it.
        """
        try:
            return self._template.render({ROW: row, **row})
        except Exception as error:  # whatever an expression of somebody's raises
            raise DataError(f"data.template cannot be written: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return " ".join(str(error).split())[:160].rstrip(".") + (f", line {line}" if line and line > 1 else "")
