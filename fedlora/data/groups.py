"""The groups that a partition goes by where labels are not what is learned: the values of a column, or one for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedlora.data import forms, nested
from fedlora.errors import DataError, counted

if TYPE_CHECKING:
    import pyarrow as pa

    from fedlora.data.columns import RawSplit

ALL = "all"
"""The one group of a set that is not grouped."""


def names(train: RawSplit, by: str | None) -> tuple[str, ...]:
    """The groups of a training split.

    Args:
        train: the split.
        by: the column. None: all are one group.

    Raises:
        DataError: there is no such column, or a row without a value.
    """
    return (ALL,) if by is None else tuple(sorted(set(texts(train, by, "partition.by"))))


def rows(split: RawSplit, by: str | None, groups: tuple[str, ...]) -> pa.Table:
    """Number (`row`) and group (`label`, an index into `groups`) of every row.

    Raises:
        DataError: there are none, or one is of a group that is none of `groups`.
    """
    import pyarrow as pa

    if not split.table.num_rows:
        raise DataError(f"{split.where} has no rows; expected one example per row")
    index = {name: position for position, name in enumerate(groups)}
    values = [ALL] * split.table.num_rows if by is None else texts(split, by, "partition.by")
    if unseen := sorted(set(values) - set(index)):
        raise DataError(
            f"{split.where} has examples of {', '.join(unseen[:3])} in column {by!r}, of which no training example "
            "is; add training examples of them or remove these rows"
        )
    labels = np.array([index[value] for value in values], dtype=np.int64)
    return pa.table({"row": np.arange(len(values)), "label": labels})


def texts(split: RawSplit, column: str, key: str) -> list[str]:
    """A column of names, none of them empty.

    Args:
        split: has it.
        column: its name, dotted where it is nested.
        key: of the configuration, which names it.

    Raises:
        DataError: there is no such column, or a row without a value.
    """
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
