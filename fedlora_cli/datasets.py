"""`fedlora datasets`: the data sets that have a name, and those that are made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedlora.errors import counted

app = typer.Typer(invoke_without_command=True, add_completion=False)


@app.callback()
def datasets(context: typer.Context) -> None:
    """The data sets that have a name, a line each; `datasets make` writes sums with answers to a file."""
    if context.invoked_subcommand:
        return
    from fedlora.data import sources
    from fedlora_cli import tables

    rows = [(known.name, known.origin, "yes" if known.available else "no", known.summary) for known in sources.known()]
    tables.listing(("name", "origin", "here", "what it is"), rows, sys.stdout)
    print("Also: a csv, jsonl or parquet file, a folder with train and test files, or a Hugging Face id (data.name=…).")


@app.command()
def make(
    task: Annotated[list[str], typer.Option(help="A task of reasoning-gym (gsm_symbolic, chain_sum, …); may repeat.")],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="A new file.")],
    size: Annotated[int, typer.Option(min=1, help="Problems of each task.")] = 2000,
    seed: Annotated[int, typer.Option(help="The same seed, the same problems.")] = 0,
    difficulty: Annotated[
        int | None, typer.Option(min=0, help="Level, from 0, of tasks that have some. Without it: as the task is.")
    ] = None,
) -> None:
    """Write sums with answers that can be checked, made by reasoning-gym (extra `maths`), to a file.

    For example: fedlora datasets make --task gsm_symbolic --size 2000 --out sums.jsonl
    """
    from fedlora.data import maths

    written = maths.make(task, size, seed, difficulty, out)
    print(f"written           {out} ({counted(written, 'problem')})")
    if repeated := size * len(set(task)) - written:
        print(f"left out          {counted(repeated, 'question')} that had been asked before")
