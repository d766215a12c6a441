"""Tables for the terminal."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedlora.errors import counted
from fedlora.report import changewords
from fedlora.report.changes import Changes
from fedlora.strategies.base import Strategy
from fedlora.sweep import comparison
from fedlora.sweep.estimate import Cost
from fedlora.sweep.plan import Sweep
from fedlora_cli import output

_WIDTH_OF_A_FILE = 140
_LEGEND = """gap: local minus global score. ρ: relative error of the aggregate, in the
first and the last round (blank where one client took part); its floor: the least
that the rank allows in the last. Clients used: whose updates entered, mean of
rounds. MB: adapters, heads and base updates, up and down."""


def console(stream: TextIO) -> Console:
    """A console that never cuts a table to the 80 columns that a file is taken to have."""
    found = Console(file=stream, highlight=False)
    return found if found.is_terminal else Console(file=stream, width=_WIDTH_OF_A_FILE, highlight=False)


def compared(results: Sequence[comparison.Result], settings: Sequence[str], stream: TextIO) -> None:
    """Print the comparison of runs: a row per setting, mean ± standard deviation where several seeds were run."""
    runs = comparison.frame(results)
    columns = comparison.columns(results)
    means, spreads = comparison.over_seeds(runs, settings, columns)
    counts = comparison.runs_of_each(runs, settings)
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    title = f"mean ± standard deviation over {seeds} seeds" if counts[-1] > 1 else None
    said = partial(output.shown, stream=stream)
    table = Table(
        title=title and said(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for name in means.index.names:
        table.add_column(said(str(name)), no_wrap=True)
    for name in columns:
        table.add_column(said(name).replace(" ", "\n"), justify="right")
    for (index, row), (_, spread) in zip(means.iterrows(), spreads.iterrows(), strict=True):
        names = index if isinstance(index, tuple) else (index,)
        cells = (comparison.cell(name, row[name], spread[name]) for name in columns)
        table.add_row(*map(said, map(str, names)), *map(said, cells))
    console(stream).print(table)
    print(_LEGEND, file=stream)
    print(comparison.shared(runs), file=stream)


def verdict(sentences: Sequence[str], stream: TextIO) -> None:
    """Print what a comparison comes to, a paragraph for each condition."""
    for sentence in sentences:
        console(stream).print(output.shown(sentence, stream), markup=False)
        print(file=stream)


def changed(found: Changes, stream: TextIO) -> None:
    """Print both scores of every choice, their difference, and how it was tested."""
    said = partial(output.shown, stream=stream)
    print(f"from {found.before}\nto   {found.after}", file=stream)
    for condition in dict.fromkeys(cell.condition for cell in found.cells):
        board = changewords.table(found, condition)
        kept = [place for place, title in enumerate(board.titles) if title in changewords.TERMINAL]
        table = Table(title=condition and said(condition), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place in kept:
            table.add_column(said(board.titles[place]), justify="left" if place == 0 else "right")
        for row in board.rows:
            table.add_row(*(said(row[place].text) for place in kept))
        console(stream).print(table)


def planned(plan: Sweep, stands: Mapping[str, str], costs: Mapping[str, Cost], parallel: int, stream: TextIO) -> None:
    """Print the runs of a sweep before they are run: how each stands, and what it is expected to take."""
    table = Table(*plan.varied, "state", "about", "memory", box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    todo = 0.0
    for cell in plan.cells:
        state, cost = stands.get(cell.digest, "waiting"), costs.get(cell.digest)
        names = [output.shown(str(cell.settings[key]), stream) for key in plan.varied]
        if cost is None:
            table.add_row(*names, state, "", "")
            continue
        todo += cost.seconds
        table.add_row(*names, "to run", _duration(cost.seconds), f"{cost.memory / 1e9:.1f} GB")
    console(stream).print(table)
    for left in plan.skipped:
        print(f"skipped: {left.label}: {left.reason}", file=stream)
    print(
        f"{counted(len(plan.cells), 'run')}; what is left takes about {_duration(todo)} one after the other",
        file=stream,
    )
    if parallel > 1:
        print(
            f"{parallel} side by side share the same worker slots: they fill each other's gaps, little more",
            file=stream,
        )
    print(
        "time and memory (of all workers of a run) are scaled from a trial of some seconds on this machine", file=stream
    )


def _duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def listing(columns: Sequence[str], rows: Iterable[Sequence[str]], stream: TextIO) -> None:
    """Print a plain table of words."""
    said = partial(output.shown, stream=stream)
    table = Table(*map(said, columns), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for row in rows:
        table.add_row(*map(said, row))
    console(stream).print(table)


def strategy(found: type[Strategy], stream: TextIO) -> None:
    """Print what a strategy says of itself: formula, source, properties, costs, options."""
    shown = console(stream)
    shown.print(f"{found.name}: {found.summary}\n", markup=False)
    shown.print(inspect.cleandoc(found.__doc__ or ""), markup=False)
    facts = {
        "source": found.source,
        "family": found.traits.family.value,
        "exact": "yes" if found.traits.exact else "no",
        "clients receive": "their own" if found.traits.personal else "the same",
        "ranks": f"one: {found.traits.one_rank}" if found.traits.one_rank else "any",
        "base": "is changed" if found.traits.changes_base else "stays as it is",
        "numbers up": f"{found.traits.cost_up}  (per module and client; r its rank, R the sum of all ranks)",
        "numbers down": found.traits.cost_down,
    }
    print(file=stream)
    for key, value in facts.items():
        shown.print(f"{key:<16} {value}", markup=False)
    for key, field in found.Options.model_fields.items():
        meaning = " ".join((field.description or "").split())
        shown.print(f"strategy_options.{key}={field.default}\n  {meaning}", markup=False)
