"""Dialogues to learn from: a prompt with its response, Alpaca's columns, or chat messages; read into one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.config import DataConfig
from fedlora.data import forms, nested, sources, splits
from fedlora.data.catalogue import resolve
from fedlora.data.messages import ROLES, Message, understood
from fedlora.data.sources import Draft
from fedlora.errors import DataError, counted

if TYPE_CHECKING:
    import pyarrow as pa

    from fedlora.data.columns import RawSplit

__all__ = ["ALL", "ROLES", "Message", "read"]

ALL = "all"
"""The one group of a set that is not grouped."""


def read(config: DataConfig, by: str | None, seed: int) -> Draft:
    """Read and check the rows, and draw the subsamples and the test split: `messages` (a list of role and content),
    `label` (an index into the labels, the values of the column `by`; one for all without it) and, as configured,
    `client`; where the set has them, the lists of texts `tests` and `options`. Only rows that are drawn are checked.

    Raises:
        DataError: nothing of that name; no columns that hold dialogues; an empty response; an unreadable file.
    """
    source = resolve(config)
    raw_train, raw_test = splits.read(source)
    notes = [*raw_train.told(), *(raw_test.told() if raw_test else [])]
    for split in (raw_train, raw_test):
        if split:
            forms.of(split, config, source.columns)  # a column that is missing comes before a row that is
    groups = _groups(raw_train, by)
    picked = _rows(raw_train, by, groups)
    if raw_test is None:
        picked, others = sources.split_off(picked, len(groups), config.test_fraction, seed, raw_train.where)
        notes.append(f"{len(others)} of {len(picked) + len(others)} rows are kept for testing (data.test_fraction)")
    else:
        others = _rows(raw_test, by, groups)
    picked = sources.subsample(picked, config.train_size, seed, "data/train")
    others = sources.subsample(others, config.test_size, seed, "data/test")
    train, told = _table(raw_train, config, source.columns, picked)
    test, more = _table(raw_test or raw_train, config, source.columns, others)
    return Draft(source, train, test, groups, (*notes, *told, *more))


def _rows(split: RawSplit, by: str | None, groups: tuple[str, ...]) -> pa.Table:
    """Number and `label` of every row.

    Raises:
        DataError: there are none, or one is of a group that is none of `groups`.
    """
    import pyarrow as pa

    if not split.table.num_rows:
        raise DataError(f"{split.where} has no rows; expected one example per row")
    index = {name: position for position, name in enumerate(groups)}
    values = [ALL] * split.table.num_rows if by is None else _texts(split, by, "partition.by")
    if unseen := sorted(set(values) - set(index)):
        raise DataError(
            f"{split.where} has examples of {', '.join(unseen[:3])} in column {by!r}, of which no training example "
            "is; add training examples of them or remove these rows"
        )
    labels = np.array([index[value] for value in values], dtype=np.int64)
    return pa.table({"row": np.arange(len(values)), "label": labels})


def _table(
    split: RawSplit, config: DataConfig, mapped: Mapping[str, str], picked: pa.Table
) -> tuple[pa.Table, list[str]]:
    """The picked rows as dialogues, and what is to be said of those that were left out."""
    import pyarrow as pa

    form, drop = forms.of(split, config, mapped), config.empty == "drop"
    extras = {"tests": forms.tests_of(split, config), "options": forms.lists_of(split, config.options, "data.options")}
    numbers, rows = picked["row"].to_numpy(), split.table.take(picked["row"]).to_pylist()
    found = [
        understood(form, row, f"{split.where}: row {number + 1}", drop)
        for number, row in zip(numbers.tolist(), rows, strict=True)
    ]
    kept = np.array([each is not None for each in found], dtype=bool)
    left = [row for row, keep in zip(rows, kept, strict=True) if keep]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))
    columns: dict[str, Any] = {"messages": pa.array([each for each in found if each is not None], kind)}
    columns["label"] = picked["label"].filter(pa.array(kept))
    owner = config.client or mapped.get("client", "")
    if config.client or owner in split.table.column_names:
        owners = _texts(split, owner, "data.client")
        columns["client"] = pa.array([owners[number] for number in numbers[kept]], pa.large_string())
    for name, lists in extras.items():
        if lists:
            columns[name] = pa.array([lists(row) for row in left], pa.list_(pa.large_string()))
    gone = len(rows) - len(left)
    note = f"{split.where}: {counted(gone, 'example')} with an empty response or prompt left out (data.empty=drop)"
    return pa.table(columns), [note] if gone else []


def _groups(train: RawSplit, by: str | None) -> tuple[str, ...]:
    return (ALL,) if by is None else tuple(sorted(set(_texts(train, by, "partition.by"))))


def _texts(split: RawSplit, column: str, key: str) -> list[str]:
    """A column of names, none of them empty."""
    forms.require(split, column, key)
    if column in split.table.column_names:
        values = split.table[column].to_pylist()
    else:
        outer = column.partition(".")[0]
        values = [nested.value({outer: each}, column) for each in split.table[outer].to_pylist()]
    empty = [number for number, value in enumerate(values, start=1) if value is None or not str(value).strip()]
    if empty:
        raise DataError(
            f"column {column!r} of {split.where}: {len(empty)} of {counted(len(values), 'example')} are empty (first: "
            f"row {empty[0]}); fill them in or remove these rows, or set {key} to another column"
        )
    return [str(value) for value in values]
