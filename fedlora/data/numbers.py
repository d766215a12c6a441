"""Texts with a number each, to be learned by regression."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedlora.config import DataConfig
from fedlora.data import groups, sources, splits
from fedlora.data.catalogue import resolve
from fedlora.data.sources import Draft
from fedlora.errors import DataError, counted
from fedlora.files.limits import short

if TYPE_CHECKING:
    import pyarrow as pa

    from fedlora.data.columns import RawSplit


def read(config: DataConfig, by: str | None, seed: int) -> Draft:
    """Read and check the rows, and draw the subsamples and the test split: `text` and, as configured, `text_pair`;
    `value` (float64), the number in the column `data.label`; `label` (an index into the labels, the values of the
    column `by`; one for all without it) and, as configured, `client`.

    Raises:
        DataError: nothing of that name; a column or text is missing; what should be a number is none; all numbers are
            the same; an unreadable file.
    """
    from fedlora.data import columns

    source = resolve(config)
    wanted = columns.column_names(config, source.columns)
    number = wanted.pop("label")
    raw_train, raw_test = splits.read(source, label=number)
    notes = [*raw_train.told(), *(raw_test.told() if raw_test else [])]
    labels = groups.names(raw_train, by)
    train = _table(raw_train, wanted, number, groups.rows(raw_train, by, labels))
    test = _table(raw_test, wanted, number, groups.rows(raw_test, by, labels)) if raw_test else None
    train, test, told = sources.drawn(train, test, len(labels), config, seed, raw_train.where)
    if len(train["value"].unique()) < 2:
        raise DataError(
            f"{raw_train.where}: all {counted(len(train), 'training example')} have the number "
            f"{train['value'][0].as_py():g} in column {number!r}, so there is nothing to learn; set data.label to "
            "another column"
        )
    return Draft(source, train, test, labels, (*notes, *told))


def _table(split: RawSplit, wanted: dict[str, str], number: str, rows: pa.Table) -> pa.Table:
    import pyarrow as pa

    from fedlora.data import columns

    chosen = columns.choose(split, wanted).table
    values = pa.array(_numbers(split, number), pa.float64())
    return chosen.append_column("label", rows["label"]).append_column("value", values).combine_chunks()


def _numbers(split: RawSplit, column: str) -> npt.NDArray[np.float64]:
    """A column of finite numbers, some of them perhaps written as text."""
    from fedlora.data import columns

    if split.table.column_names.count(column) != 1:
        raise DataError(columns.missing(split, "label", column))
    values = [_number(value) for value in split.table[column].to_pylist()]
    broken = [row for row, value in enumerate(values) if not math.isfinite(value)]
    if broken:
        first = split.table[column][broken[0]].as_py()
        raise DataError(
            f"column {column!r} of {split.where}: {len(broken)} of {counted(len(values), 'example')} have no number "
            f"there, which is what task=regression learns (first: row {broken[0] + 1}, {short(first)}); mend or remove "
            "these rows, or set data.label to another column"
        )
    return np.array(values, dtype=np.float64)


def _number(value: Any) -> float:
    """Not finite where it is none, or beyond single precision."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return found if abs(found) <= float(np.finfo(np.float32).max) else math.nan
