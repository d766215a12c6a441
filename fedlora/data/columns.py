"""From the columns that a source happens to have to ours: `text`, `text_pair`, `label` (class index), `client`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedlora.config import DataConfig
from fedlora.errors import DataError, counted

_OPTIONS = {"text": "data.text", "text_pair": "data.text_pair", "label": "data.label", "client": "data.client"}


@dataclass(frozen=True)
class RawSplit:
    """One split as the source has it."""

    table: pa.Table
    where: str
    """For error messages: the file, or the set and its split."""
    label_names: tuple[str, ...] | None = None
    """Class names by index, where the source declares them."""
    notes: tuple[str, ...] = ()
    """What its reader did besides reading."""
    columns: tuple[str, ...] = ()
    """Names of all columns that the source has, also of those that were not kept."""

    def told(self) -> list[str]:
        """How many rows there are, and the notes, for a person."""
        return [f"{self.where}: {counted(self.table.num_rows, 'row')}", *self.notes]


def column_names(config: DataConfig, mapped: dict[str, str]) -> dict[str, str]:
    """Our column → the column to read: what the user set, and the set's own mapping where the user left the default."""
    wanted = {"text": config.text, "text_pair": config.text_pair, "label": config.label, "client": config.client}
    for ours, theirs in mapped.items():
        if ours in wanted and wanted[ours] == DataConfig.model_fields[ours].default:
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
            raise DataError(missing(split, ours, theirs))
        if split.table.column_names.count(theirs) > 1:
            raise DataError(
                f"{split.where}: column {theirs!r} is there {split.table.column_names.count(theirs)} times; "
                "rename or remove all but one"
            )
        column = _without_nan(_plain_type(split.table[theirs]), ours)
        column = _plain(split, column, ours, theirs)
        _refuse_empty(column, ours, f"column {theirs!r} of {split.where}")
        columns[ours] = column
    return RawSplit(pa.table(columns), split.where, split.label_names)


def is_unlabelled(split: RawSplit, label: str) -> bool:
    """Whether a split has no label at all: benchmarks publish theirs as -1."""
    if split.table.column_names.count(label) != 1:
        return False
    column = _plain_type(split.table[label])
    if pa.types.is_nested(column.type):
        return False
    hidden = pc.is_in(column.cast(pa.large_string()), pa.array(["-1"], pa.large_string()))
    return bool(pc.all(pc.or_(hidden, pc.is_null(column))).as_py())


def class_names(train: RawSplit) -> tuple[str, ...]:
    """The classes: as the source declares them, otherwise those of the training split in order (numbers by value).

    Raises:
        DataError: fewer than two classes, or a label of its own for every example.
    """
    distinct = pc.unique(train.table["label"]).to_pylist()
    if len(distinct) < 2:
        raise DataError(
            f"{train.where} has one class only ({distinct[0]!r} in all {counted(train.table.num_rows, 'row')}); "
            "expected at least two. Set data.label to the column that holds the label"
        )
    if train.label_names:
        return train.label_names
    if len(distinct) == train.table.num_rows > 2:
        raise DataError(
            f"{train.where}: all {len(distinct)} labels differ, so nothing can be learned from them; "
            "set data.label to the column that holds the class"
        )
    return tuple(sorted(map(str, distinct), key=_order(distinct)))


def encode(split: RawSplit, names: tuple[str, ...]) -> pa.Table:
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
                f"{split.where} has {counted(index.null_count, 'example')} of labels that no training example has "
                f"({', '.join(unseen[:3])}{', …' if len(unseen) > 3 else ''}); add training examples of them or "
                "remove these rows"
            )
        labels = index
    position = split.table.column_names.index("label")
    table = split.table.set_column(position, "label", labels.cast(pa.int64()))
    return table.combine_chunks()


def _order(labels: list[object]) -> Callable[[str], Any]:
    if all(re.fullmatch(r"-?\d{1,18}", str(label)) for label in labels):
        return lambda label: (int(label), label)
    return str


def _plain_type(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _without_nan(column: pa.ChunkedArray, ours: str) -> pa.ChunkedArray:
    """Missing is missing: `NaN` among numbers, and the word for it where labels or owners are numbers written as text.

    Elsewhere `nan` may be a word.
    """
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if ours not in ("label", "client") or not is_text:
        return column
    missing = pc.equal(pc.utf8_lower(column), "nan")
    others = [value for value in pc.unique(column).to_pylist() if value is not None and value.lower() != "nan"]
    if not pc.any(missing).as_py() or not others or not all(_NUMBER.fullmatch(value) for value in others):
        return column
    return pc.if_else(missing, pa.scalar(None, column.type), column)


_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def _plain(split: RawSplit, column: pa.ChunkedArray, ours: str, theirs: str) -> pa.ChunkedArray:
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
            f"{where}: {len(rows)} of {counted(len(column), 'example')} have {what} (first: row {rows[0] + 1}); "
            "fill them in or remove these rows"
        )


def missing(split: RawSplit, ours: str, theirs: str) -> str:
    """That a column is not there, and which might be meant."""
    have = split.table.column_names
    return (
        f"{split.where} has no column {theirs!r} for the {ours.replace('_', ' ')}; its columns are: "
        f"{', '.join(have)}.{_meant(split.table, ours, theirs)} Set {_OPTIONS[ours]} to one of them"
    )


def _meant(table: pa.Table, ours: str, theirs: str) -> str:
    """The column that is spelled alike, or else has what is asked for: long texts, or few classes; or nothing."""
    by_lower = {name.lower(): name for name in table.column_names}
    alike = difflib.get_close_matches(theirs.lower(), by_lower, n=1, cutoff=0.75)
    if alike:
        return f" Did you mean '{by_lower[alike[0]]}'?"
    found = {"text": _longest, "text_pair": _longest, "label": _classes}.get(ours, lambda table: None)(table)
    return f" '{found}' holds {'classes' if ours == 'label' else 'the longest texts'}: is it that?" if found else ""


_SAMPLE = 1000


def _longest(table: pa.Table) -> str | None:
    """The column of text whose cells are clearly longer than those of all others."""
    lengths: list[tuple[float, str]] = sorted(
        ((_mean_length(table.column(i)), name) for i, name in enumerate(table.column_names)), reverse=True
    )
    if not lengths or lengths[0][0] < _A_TEXT or (lengths[1:] and lengths[0][0] < 2 * lengths[1][0]):
        return None
    return lengths[0][1]


_A_TEXT = 15
"""Mean characters of what is likely a text."""


def _mean_length(column: pa.ChunkedArray) -> float:
    column = _plain_type(column)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return 0.0
    return float(pc.mean(pc.utf8_length(column.slice(0, _SAMPLE))).as_py() or 0.0)


def _classes(table: pa.Table) -> str | None:
    """The only column with at least two and few different values."""
    rows = min(table.num_rows, _SAMPLE)
    found = []
    for index, name in enumerate(table.column_names):
        column = _plain_type(table.column(index)).slice(0, _SAMPLE)
        if pa.types.is_nested(column.type) or _mean_length(column) > 2 * _A_TEXT:
            continue
        if 2 <= pc.count_distinct(column).as_py() <= rows // 5:
            found.append(name)
    return found[0] if len(found) == 1 else None
