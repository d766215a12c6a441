"""How a row becomes messages: by columns of prompts and responses, by a template, Alpaca's columns, or chats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fedlora.config import DataConfig
from fedlora.data import nested
from fedlora.errors import DataError

if TYPE_CHECKING:
    from fedlora.data.columns import RawSplit

Row = Mapping[str, Any]
Form = Callable[[Row], Any]
"""A row's messages: a list of role and content, or something else where the set is no dialogues."""

_CHATS = ("messages", "conversations", "conversation")
_INSTRUCTED = ("instruction", ("input", "context"), ("output", "response"))
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"))
_RESPONSES = ("response", "output", "completion", "answer")


def of(split: RawSplit, config: DataConfig, mapped: Mapping[str, str]) -> Form:
    """How rows of this set become messages: as configured, as the catalogue has it (`mapped`), or by their columns.

    Raises:
        DataError: a column that is named is not there, or there are none that hold dialogues.
    """
    keys = ("messages", "prompt", "template", "response")
    given = {key: found for key in keys if (found := getattr(config, key)) is not None}
    given = given or {key: mapped[key] for key in keys if key in mapped}
    for key in given.keys() - {"template"}:
        require(split, given[key], f"data.{key}")
    if "messages" in given:
        return lambda row: nested.value(row, given["messages"])
    if "template" in given:
        return _templated(split, given["template"], given.get("response"))
    if "prompt" in given:
        return lambda row: _pair(nested.value(row, given["prompt"]), nested.value(row, given["response"]))
    return _by_columns(split)


def require(split: RawSplit, path: str, key: str) -> None:
    """Raises:
    DataError: there is no such column, nor a nested one.
    """
    schema = split.table.schema
    if not nested.has(schema, path):
        raise DataError(f"{split.where} has no column {path!r} for {key}; its columns are: {nested.names(schema)}")


def lists_of(split: RawSplit, column: str | None, key: str) -> Callable[[Row], list[str]] | None:
    """A column of lists of texts; one text is a list of one. None where no column is named.

    Raises:
        DataError: there is no such column.
    """
    if column is None:
        return None
    require(split, column, key)

    def found(row: Row) -> list[str]:
        value = nested.value(row, column)
        return [str(each) for each in (value if isinstance(value, list) else [value]) if each is not None]

    return found


def tests_of(split: RawSplit, config: DataConfig) -> Callable[[Row], list[str]] | None:
    """The Python statements that an answer is judged by: those of `data.tests`, or as MBPP and HumanEval have them.

    What is to be run before them (`test_setup_code`) is the first of them.
    """
    have = split.table.column_names
    if config.tests is None and {"test", "entry_point"} <= set(have):
        return lambda row: [row["test"], f"check({row['entry_point']})"]
    tests = lists_of(split, config.tests or ("test_list" if "test_list" in have else None), "data.tests")
    if tests is None or "test_setup_code" not in have:
        return tests
    return lambda row: [*([row["test_setup_code"]] if (row["test_setup_code"] or "").strip() else []), *tests(row)]


def _by_columns(split: RawSplit) -> Form:
    have, schema = split.table.column_names, split.table.schema
    for chat in _CHATS:
        if chat in have and (chat == "messages" or nested.has(schema, f"{chat}.0")):
            return lambda row: row[chat]
    instruction, inputs, outputs = _INSTRUCTED
    more, output = (next((name for name in names if name in have), None) for names in (inputs, outputs))
    if instruction in have and output:
        return lambda row: _pair(_with_input(row[instruction], row[more] if more else None), row[output])
    for asked, answered in _PAIRS:
        if {asked, answered} <= set(have):
            return lambda row, asked=asked, answered=answered: _pair(row[asked], row[answered])  # type: ignore[misc]
    raise DataError(
        f"{split.where} has no columns that hold dialogues; its columns are: {nested.names(schema)}. Set data.prompt "
        "(or data.template) and data.response, or data.messages; or have `messages`, or `instruction`, `input` and "
        "`output`"
    )


def _templated(split: RawSplit, text: str, response: str | None) -> Form:
    from fedlora.data.template import Template

    names = split.table.column_names
    answer = response or next((name for name in _RESPONSES if name in names), None)
    if answer is None:
        raise DataError(
            f"data.template is what is asked, and data.response is to name the column of {split.where} that holds "
            f"the answer; its columns are: {nested.names(split.table.schema)}"
        )
    template = Template(text, names, split.where)
    return lambda row: _pair(template(row), nested.value(row, answer))


def _pair(prompt: Any, response: Any) -> list[Any]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _with_input(instruction: Any, more: Any) -> Any:
    return f"{instruction}\n\n{more}" if more and str(more).strip() else instruction
