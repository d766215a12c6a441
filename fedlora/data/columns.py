"""From the columns that a source happens to have to ours: `text`, `text_pair`, `label` (class index), `client`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import InMemoryTable

from fedlora.config import DataConfig
from fedlora.errors import DataError, did_you_mean

_OPTIONS = {"text": "data.text", "text_pair": "data.text_pair", "label": "data.label", "client": "data.client"}


@dataclass(frozen=True)
class RawSplit:
    """One split as the source has it."""

    table: pa.Table
    where: str
    """For error messages: the file, or the set and its split."""
    label_names: tuple[str, ...] | None = None
    """Class names by index, where the source declares them."""


def column_names(config: DataConfig, mapped: dict[str, str]) -> dict[str, str]:
    """Our column → the column to read: what the user set, and the set's own mapping where the user left the default."""
    wanted = {"text": config.text, "text_pair": config.text_pair, "label": config.label, "client": config.client}
    for ours, theirs in mapped.items():
        if wanted[ours] == DataConfig.model_fields[ours].default:
            wanted[ours] = theirs
    return {ours: theirs for ours, theirs in wanted.items() if theirs is not None}


def choose(split: RawSplit, names: dict[str, str]) -> RawSplit:
    """The columns we use, under our names, all of them text except whole-number labels.

    Raises:
        DataError: a column is missing, of a wrong type, or has empty entries.
    """
    if split.table.num_rows == 0:
        raise DataError(f"{split.where} has no rows; expected one example per row")
    columns = {}
    for ours, theirs in names.items():
        if theirs not in split.table.column_names:
            raise DataError(_missing(split, ours, theirs))
        column = _plain(split, ours, theirs)
        _refuse_empty(column, ours, f"column {theirs!r} of {split.where}")
        columns[ours] = column
    return RawSplit(pa.table(columns), split.where, split.label_names)


def class_names(train: RawSplit) -> tuple[str, ...]:
    """The classes: as the source declares them, otherwise those of the training split in order (numbers by value).

    Raises:
        DataError: fewer than two classes, or a label of its own for every example.
    """
    distinct = pc.unique(train.table["label"]).to_pylist()
    if len(distinct) < 2:
        raise DataError(
            f"{train.where} has one class only ({distinct[0]!r} in all {train.table.num_rows} rows); expected at least "
            "two. Set data.label to the column that holds the label"
        )
    if train.label_names:
        return train.label_names
    if len(distinct) == train.table.num_rows > 2:
        raise DataError(
            f"{train.where}: all {len(distinct)} labels differ, so nothing can be learned from them; "
            "set data.label to the column that holds the class"
        )
    return tuple(sorted(map(str, distinct), key=_order(distinct)))


def encode(split: RawSplit, names: tuple[str, ...]) -> datasets.Dataset:
    """The split with labels as indices into `names` (int64).

    Raises:
        DataError: a label that is not among the names.
    """
    labels = split.table["label"]
    if not split.label_names:
        index = pc.index_in(labels.cast(pa.string()), value_set=pa.array(names, pa.string()))
        if index.null_count:
            unseen = sorted(set(labels.cast(pa.string()).filter(pc.is_null(index)).to_pylist()))
            raise DataError(
                f"{split.where} has {index.null_count} examples of labels that no training example has "
                f"({', '.join(unseen[:3])}{', …' if len(unseen) > 3 else ''}); add training examples of them or "
                "remove these rows"
            )
        labels = index
    position = split.table.column_names.index("label")
    table = split.table.set_column(position, "label", labels.cast(pa.int64()))
    return datasets.Dataset(InMemoryTable(table.combine_chunks()))


def _order(labels: list[object]) -> Callable[[str], Any]:
    if all(re.fullmatch(r"-?\d{1,18}", str(label)) for label in labels):
        return lambda label: (int(label), label)
    return str


def _plain(split: RawSplit, ours: str, theirs: str) -> pa.ChunkedArray:
    column = split.table[theirs]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if ours == "label" and pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    if ours == "label" and pa.types.is_floating(column.type):
        return _whole(column, f"column {theirs!r} of {split.where}")
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        raise DataError(f"column {theirs!r} of {split.where} holds {column.type}, expected text; set {_OPTIONS[ours]}")
    return column.cast(pa.large_string())


def _whole(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Labels such as 1.0: a whole-number column with a gap in it is read as floats by some tools."""
    values = column.drop_null().to_numpy()
    broken = values[values != np.floor(values)]
    if len(broken) or not np.isfinite(values).all():
        raise DataError(
            f"{where} holds fractions ({broken[0] if len(broken) else 'infinite values'}), expected classes (text or "
            "whole numbers); set data.label"
        )
    return column.cast(pa.int64())


def _refuse_empty(column: pa.ChunkedArray, ours: str, where: str) -> None:
    empty = pc.is_null(column)
    if ours in ("label", "client") and pa.types.is_large_string(column.type):
        empty = pc.or_(empty, pc.equal(pc.utf8_trim_whitespace(pc.fill_null(column, "")), ""))
    rows = np.flatnonzero(empty.to_numpy())
    if len(rows):
        what = {"label": "no label", "client": "no owner"}.get(ours, "no text")
        raise DataError(
            f"{where}: {len(rows)} of {len(column)} examples have {what} (first: row {rows[0] + 1}); "
            "fill them in or remove these rows"
        )


def _missing(split: RawSplit, ours: str, theirs: str) -> str:
    have = split.table.column_names
    return (
        f"{split.where} has no column {theirs!r} for the {ours.replace('_', ' ')}; its columns are: "
        f"{', '.join(have)}.{did_you_mean(theirs, have)} Set {_OPTIONS[ours]} to one of them"
    )
