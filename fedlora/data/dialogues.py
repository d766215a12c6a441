"""Dialogues to learn from: a prompt with its response, Alpaca's columns, or chat messages; read into one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.config import DataConfig
from fedlora.data import sources, splits
from fedlora.data.catalogue import resolve
from fedlora.data.sources import Draft
from fedlora.errors import DataError, counted

if TYPE_CHECKING:
    import pyarrow as pa

    from fedlora.data.columns import RawSplit

Message = dict[str, str]
"""`role` (of `ROLES`) and `content`."""
ROLES = ("system", "user", "assistant")
ALL = "all"
"""The one group of a set that is not grouped."""
_ALPACA = ("instruction", "output")
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"))


def read(config: DataConfig, by: str | None, seed: int) -> Draft:
    """Read and check the rows, and draw the subsamples and the test split: `messages` (a list of role and content),
    `label` (an index into the labels, the values of the column `by`; one for all without it) and, as configured,
    `client`.

    Raises:
        DataError: nothing of that name; no columns that hold dialogues; an empty response; an unreadable file.
    """
    source = resolve(config)
    raw_train, raw_test = splits.read(source)
    notes = [*raw_train.told(), *(raw_test.told() if raw_test else [])]
    groups = _groups(raw_train, by)
    train = _table(raw_train, config, source.columns, by, groups)
    if raw_test is None:
        train, test = sources.split_off(train, len(groups), config.test_fraction, seed, raw_train.where)
        notes.append(f"{len(test)} of {len(train) + len(test)} rows are kept for testing (data.test_fraction)")
    else:
        test = _table(raw_test, config, source.columns, by, groups)
    train = sources.subsample(train, config.train_size, seed, "data/train")
    test = sources.subsample(test, config.test_size, seed, "data/test")
    return Draft(source, train, test, groups, tuple(notes))


def _table(
    split: RawSplit, config: DataConfig, mapped: Mapping[str, str], by: str | None, groups: tuple[str, ...]
) -> pa.Table:
    import pyarrow as pa

    rows = split.table.to_pylist()
    if not rows:
        raise DataError(f"{split.where} has no rows; expected one example per row")
    understand = _form(split, config, mapped)
    messages = [_checked(understand(row), f"{split.where}: row {number}") for number, row in enumerate(rows, start=1)]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))
    columns: dict[str, Any] = {"messages": pa.array(messages, kind)}
    index = {name: position for position, name in enumerate(groups)}
    values = [ALL] * len(rows) if by is None else _texts(split, by, "partition.by")
    if unseen := sorted(set(values) - set(index)):
        raise DataError(
            f"{split.where} has examples of {', '.join(unseen[:3])} in column {by!r}, of which no training example "
            "is; add training examples of them or remove these rows"
        )
    columns["label"] = pa.array(np.array([index[value] for value in values], dtype=np.int64))
    if owner := config.client or mapped.get("client"):
        columns["client"] = pa.array(_texts(split, owner, "data.client"), pa.large_string())
    return pa.table(columns)


def _groups(train: RawSplit, by: str | None) -> tuple[str, ...]:
    return (ALL,) if by is None else tuple(sorted(set(_texts(train, by, "partition.by"))))


def _texts(split: RawSplit, column: str, key: str) -> list[str]:
    """A column of names, none of them empty."""
    if column not in split.table.column_names:
        have = ", ".join(split.table.column_names)
        raise DataError(f"{split.where} has no column {column!r} for {key}; its columns are: {have}")
    values = split.table[column].to_pylist()
    empty = [number for number, value in enumerate(values, start=1) if value is None or not str(value).strip()]
    if empty:
        raise DataError(
            f"column {column!r} of {split.where}: {len(empty)} of {counted(len(values), 'example')} are empty (first: "
            f"row {empty[0]}); fill them in or remove these rows, or set {key} to another column"
        )
    return [str(value) for value in values]


def _form(split: RawSplit, config: DataConfig, mapped: Mapping[str, str]) -> Callable[[Mapping[str, Any]], Any]:
    """How a row of this set becomes messages."""
    have = split.table.column_names
    prompt, response = config.prompt or mapped.get("prompt"), config.response or mapped.get("response")
    if prompt and response:
        for column, key in ((prompt, "data.prompt"), (response, "data.response")):
            if column not in have:
                raise DataError(f"{split.where} has no column {column!r} for {key}; its columns are: {', '.join(have)}")
        return lambda row: _pair(row[prompt], row[response])
    if "messages" in have:
        return lambda row: row["messages"]
    if set(_ALPACA) <= set(have):
        return lambda row: _pair(_with_input(row["instruction"], row.get("input")), row["output"])
    for asked, answered in _PAIRS:
        if {asked, answered} <= set(have):
            return lambda row, asked=asked, answered=answered: _pair(row[asked], row[answered])  # type: ignore[misc]
    raise DataError(
        f"{split.where} has no columns that hold dialogues; its columns are: {', '.join(have)}. Set data.prompt and "
        "data.response to two of them, or have `messages`, or `instruction`, `input` and `output`"
    )


def _pair(prompt: Any, response: Any) -> list[Any]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _with_input(instruction: Any, more: Any) -> Any:
    return f"{instruction}\n\n{more}" if more and str(more).strip() else instruction


def _checked(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise DataError(f"{where} holds {type(messages).__name__} for messages, expected a list of role and content")
    found = []
    for each in messages:
        role, content = each.get("role"), each.get("content")
        if role not in ROLES:
            raise DataError(f"{where} has a message of role {role!r:.40}, expected one of {', '.join(ROLES)}")
        if content is None or not str(content).strip():
            what = "an empty response" if role == "assistant" else f"an empty message of role {role}"
            raise DataError(f"{where} has {what}; fill it in or remove the row")
        found.append({"role": role, "content": str(content)})
    if not any(each["role"] == "assistant" for each in found):
        raise DataError(f"{where} has no message of role assistant, so nothing could be learned from it; remove it")
    return found
