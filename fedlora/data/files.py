"""Reads csv, tsv, jsonl, json and parquet files into Arrow tables. Words like `NA` and `null` stay text.

Nothing is guessed about a cell and no row is lost without a word: what a reader did besides reading (blank lines passed
over, another delimiter than the ending says, no quoting) it tells in `Read.notes`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from fedlora.data import swallowed
from fedlora.errors import DataError
from fedlora.files import limits

_DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True)
class Read:
    """The rows of one file, and what its reader did besides reading."""

    table: pa.Table
    columns: tuple[str, ...]
    """Names of all columns of the file, also of those that were not kept."""
    notes: tuple[str, ...] = ()


def read_table(path: Path, columns: Collection[str] | None = None) -> Read:
    """All rows of one file; every column of a csv or tsv file is text, unquoted empty cells are null.

    Args:
        path: its ending says its kind.
        columns: names of those to keep in memory, where the file has them; None: all.

    Raises:
        DataError: the file cannot be read or parsed, is a pointer to a file of Git LFS, or has no rows.
    """
    try:
        limits.refuse_pointer(path)
        read = _READERS[path.suffix.lower()](path, columns)
    except (OSError, ValueError, TypeError, RecursionError, csv.Error, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"cannot read {path} as {path.suffix[1:]}: {reason}. Mend or replace the file") from error
    if read.table.num_rows == 0:
        raise DataError(f"{path} has no rows; expected one example per row")
    return read


def _read_csv(path: Path, columns: Collection[str] | None) -> Read:
    delimiter, notes = _delimiter(path)
    header, rows, blank, quoting, why = _dialect(path, delimiter)
    # Types are not guessed: a guess from the first megabyte fails on what comes after it, and turns "NA" into nothing.
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()),
        include_columns=None if columns is None else [name for name in dict.fromkeys(header) if name in columns],
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    parse = pyarrow.csv.ParseOptions(
        delimiter=delimiter, newlines_in_values=quoting, quote_char='"' if quoting else False
    )
    table = pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)
    if table.num_columns and table.num_rows != rows:
        raise ValueError(f"it has {rows} rows by one way of reading quotation marks and {table.num_rows} by another")
    if quoting and (line := swallowed.find(table, header, delimiter)):
        raise ValueError(
            f"a quotation mark before {limits.short(line, 40)} makes one cell of lines that look like rows; double "
            "quotation marks inside a text and enclose the text in such marks (if it is one text, give a jsonl or "
            "parquet file)"
        )
    return Read(table, tuple(header), (*notes, *why, *_passed_over(blank)))


def _delimiter(path: Path) -> tuple[str, list[str]]:
    """What separates the cells: as the ending says, or another one where the first line has no such sign in it."""
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        first = file.readline(1_000_000)
    if not first.strip():
        raise ValueError("the file is empty; expected a first line with column names")
    widths = {sign: len(next(csv.reader([first], delimiter=sign))) for sign in _DELIMITERS}
    if widths[usual] > 1 or max(widths.values()) == 1:
        return usual, []
    found = max(widths, key=lambda sign: widths[sign])
    return found, [f"its cells are separated by a {_DELIMITERS[found]}, not by a {_DELIMITERS[usual]}"]


def _dialect(path: Path, delimiter: str) -> tuple[list[str], int, int, bool, list[str]]:
    """Header, rows, blank lines, whether quotation marks enclose cells, and what to tell of that.

    A text that begins with a quotation mark opens a cell which ends at the next such text, some rows further on. So
    quoting is strict (nothing may follow the closing mark), and where quoted cells go over several lines although every
    line is a row by itself, the marks are taken for what they are: text.
    """
    try:
        quoted = _count(path, delimiter, csv.QUOTE_MINIMAL)
    except ValueError as error:
        plain = _count(path, delimiter, csv.QUOTE_NONE)
        if delimiter != "\t" or not plain.even:
            raise
        return _unquoted(plain, str(error))
    if quoted.first_long:
        plain = _count(path, delimiter, csv.QUOTE_NONE)
        if plain.even and plain.rows > quoted.rows:
            what = f"line {quoted.first_long}: a quotation mark opens a cell that takes in rows which are whole"
            if delimiter == "\t":
                return _unquoted(plain, what)
            raise ValueError(f"{what}; double quotation marks inside a text and enclose the text in such marks")
    return quoted.header, quoted.rows, quoted.blank, True, []


def _unquoted(plain: _Counted, why: str) -> tuple[list[str], int, int, bool, list[str]]:
    return plain.header, plain.rows, plain.blank, False, [f"quotation marks are read as text ({why})"]


@dataclass(frozen=True)
class _Counted:
    header: list[str]
    rows: int
    blank: int
    even: bool
    """Whether every row has a cell for each column."""
    first_long: int
    """Line in which the first row begins that takes more than one line; 0: there is none."""


def _count(path: Path, delimiter: str, quoting: Any) -> _Counted:
    """Go through a file once.

    Raises:
        ValueError: text after a closing quotation mark, or one that is never closed; names both lines.
    """
    rows = blank = first_long = 0
    even, began = True, 1
    csv.field_size_limit(_LONGEST_CELL)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=quoting != csv.QUOTE_NONE)
        try:
            header = next(reader)
            began = reader.line_num + 1
            for cells in reader:
                if cells:
                    rows += 1
                    even = even and len(cells) == len(header)
                else:
                    blank += 1
                if reader.line_num > began:
                    first_long = first_long or began
                began = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(_where_it_breaks(error, began, reader.line_num)) from None
    return _Counted(header, rows, blank, even, first_long)


def _where_it_breaks(error: csv.Error, began: int, line: int) -> str:
    if "expected after" in str(error):
        opened = f"the row that begins in line {began}" if line > began else "it"
        return (
            f"line {line}: text after a closing quotation mark is not csv (in {opened} a quotation mark opens a cell); "
            "double quotation marks inside a text and enclose the text in such marks"
        )
    if "unexpected end" in str(error):
        return f"line {began}: a quotation mark opens a cell and none closes it"
    return f"line {line}: {error}"


def _passed_over(blank: int) -> list[str]:
    return [f"{blank} blank line{'s' if blank > 1 else ''} passed over"] if blank else []


def _read_json(path: Path, columns: Collection[str] | None) -> Read:
    text = path.read_text(encoding="utf-8-sig")
    blank = 0
    if text.lstrip().startswith("["):
        rows = list(enumerate(_parse_json(text), start=1))
    else:
        lines = text.removesuffix("\n").split("\n")
        rows = [(number, _parse_line(line, number)) for number, line in enumerate(lines, 1) if line.strip()]
        blank = len(lines) - len(rows) if rows else 0
    for number, row in rows:
        if not isinstance(row, dict):
            raise TypeError(f"entry {number} is {type(row).__name__}, expected an object with the columns as keys")
    names = tuple(dict.fromkeys(key for _, row in rows for key in row))
    kept = [name for name in names if columns is None or name in columns]
    table = pa.table({name: _column([row.get(name) for _, row in rows]) for name in kept})
    return Read(table, names, tuple(_passed_over(blank)))


def _column(values: list[Any]) -> pa.Array:
    """One column; whole numbers among fractions are such too, and where numbers and text are mixed, all become text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.array([None if value is None else float(value) for value in values])
    return pa.array([value if value is None else str(value) for value in values] if len(kinds) > 1 else values)


def _parse_line(line: str, number: int) -> Any:
    try:
        return _parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} at character {error.pos + 1}") from error
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _parse_json(text: str) -> Any:
    """JSON as Python and pandas write it: their `NaN`, which is no JSON, is a missing value."""
    return json.loads(text, parse_constant=_constant, object_pairs_hook=limits.once)


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name)


def _read_parquet(path: Path, columns: Collection[str] | None) -> Read:
    with pq.ParquetFile(path) as file:  # unlike `read_table`, it reads columns of the same name
        have = tuple(file.schema_arrow.names)
        kept = None if columns is None else [name for name in have if name in columns]
        return Read(file.read(columns=kept), have)


_READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
