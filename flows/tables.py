"""Tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TextIO

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedlora import comparison

_WIDTH_OF_A_FILE = 140
_LEGEND = """gap: local minus global accuracy. ρ: relative error of the aggregate, in the
first and the last round; its floor: the least that the rank allows in the last.
MB: adapters and heads, up and down."""
_DIGITS = {"MB": 1, "seconds": 0}


def console(stream: TextIO) -> Console:
    """A console that never cuts a table to the 80 columns that a file is taken to have."""
    found = Console(file=stream, highlight=False)
    return found if found.is_terminal else Console(file=stream, width=_WIDTH_OF_A_FILE, highlight=False)


def compared(cells: Sequence[comparison.Cell], settings: Sequence[str], stream: TextIO) -> None:
    """Print the comparison of runs: a row per setting, mean ± standard deviation where several seeds were run."""
    runs = comparison.frame(cells)
    means, spreads = comparison.over_seeds(runs, settings)
    seeds = runs["seed"].nunique() if "seed" in runs else 1
    title = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else None
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in means.index.names:
        table.add_column(str(name), no_wrap=True)
    for name in comparison.COLUMNS:
        table.add_column(name, justify="right")
    for (index, row), (_, spread) in zip(means.iterrows(), spreads.iterrows(), strict=True):
        names = index if isinstance(index, tuple) else (index,)
        table.add_row(*map(str, names), *(_cell(name, row[name], spread[name]) for name in comparison.COLUMNS))
    console(stream).print(table)
    print(_LEGEND, file=stream)
    _print_partition(runs, stream)


def _print_partition(runs: pd.DataFrame, stream: TextIO) -> None:
    if len(runs) == 1:
        print(f"partition hash {runs['partition'].iloc[0]}", file=stream)
    elif comparison.same_partition(runs):
        hashes = ", ".join(sorted(set(runs["partition"])))
        print(f"All runs of a seed share one partition (hash {hashes}): only the settings above vary.", file=stream)
    else:
        print(
            "The partitions differ between runs of one seed, so the rows differ in more than their settings.",
            file=stream,
        )


def _cell(name: str, value: float, spread: float) -> str:
    digits = _DIGITS.get(name, 3)
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text if math.isnan(spread) else f"{text} ± {spread:.{digits}f}"


def listing(columns: Sequence[str], rows: Iterable[Sequence[str]], stream: TextIO) -> None:
    """Print a plain table of words."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console(stream).print(table)
