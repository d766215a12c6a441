"""Reads csv, tsv, jsonl, json and parquet files into Arrow tables. Words like `NA` and `null` stay text."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from fedlora.errors import DataError


def read_table(path: Path) -> pa.Table:
    """All rows and columns of one file; every column of a csv or tsv file is text, unquoted empty cells are null.

    Raises:
        DataError: the file cannot be read or parsed, or has no rows.
    """
    try:
        table = _READERS[path.suffix.lower()](path)
    except (OSError, ValueError, TypeError, RecursionError, csv.Error, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot read {path} as {path.suffix[1:]}: {reason}. Mend or replace the file") from error
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows; expected one example per row")
    return table


def _read_csv(path: Path) -> pa.Table:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file, delimiter=delimiter), None)
    if header is None:
        raise ValueError("the file is empty; expected a first line with column names")
    # Types are not guessed: a guess from the first megabyte fails on what comes after it, and turns "NA" into nothing.
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
    )
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    return pyarrow.csv.read_csv(path, parse_options=parse, convert_options=convert)


def _read_json(path: Path) -> pa.Table:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = list(enumerate(json.loads(text), start=1))
    else:
        rows = [(number, _parse(line, number)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, row in rows:
        if not isinstance(row, dict):
            raise TypeError(f"entry {number} is {type(row).__name__}, expected an object with the columns as keys")
    names = dict.fromkeys(name for _, row in rows for name in row)
    return pa.table({name: _column([row.get(name) for _, row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    """One column; where numbers and text are mixed, all become text."""
    kinds = {type(value) for value in values if value is not None}
    return pa.array([value if value is None else str(value) for value in values] if len(kinds) > 1 else values)


def _parse(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg} at character {error.pos + 1}") from error


_READERS = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json, ".json": _read_json, ".parquet": pq.read_table}
