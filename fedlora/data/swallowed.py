"""Rows that have become the inside of a cell, because one text opens a quotation mark and a later one closes it.

Such a file is well-formed, and whether it is meant so can only be told by what the cell holds: a row's end, whole rows
and a row's beginning, with labels or owners that other rows have too.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc


def find(table: pa.Table, header: Sequence[str], delimiter: str) -> str | None:
    """The first line of a cell that is made of rows; None where there is none.

    Args:
        table: columns of text, some of the file's or all.
        header: names of all the file's columns, in order.
        delimiter: what separates cells.
    """
    if len(set(header)) < len(header):
        return None
    places = {name: header.index(name) for name in table.column_names}
    known = {places[name]: values for name in places if (values := _few(table[name])) is not None}
    for name, place in places.items():
        others = {other: values for other, values in known.items() if other != place}
        several = table[name].filter(pc.fill_null(pc.match_substring(table[name], "\n"), False)) if others else []
        for cell in several:
            lines = cell.as_py().splitlines()
            if _are_rows([line.split(delimiter) for line in lines], place, len(header) - 1, others):
                return str(lines[0])
    return None


def _few(column: pa.ChunkedArray) -> set[str] | None:
    """The values of a column that repeat themselves, as labels and owners do."""
    values = pc.unique(column)
    return set(values.to_pylist()) if len(values) <= max(2, len(column) // 4) else None


def _are_rows(lines: list[list[str]], place: int, last: int, known: dict[int, set[str]]) -> bool:
    """Whether the lines are a row from the cell at `place` on, whole rows, and a row up to that cell."""
    checked = 0
    for number, cells in enumerate(lines):
        first = place if number == 0 else 0
        end = place if number == len(lines) - 1 else last
        if len(cells) != end - first + 1:
            return False
        for index, values in known.items():
            if first <= index <= end:
                checked += 1
                if cells[index - first] not in values:
                    return False
    return checked > 0 and len(lines) > 1
