"""What the models wrote, side by side: the same prompts, a column for each choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from fedlora.report import frames, views
from fedlora.report.decision import Condition, Decision, Standing
from fedlora.report.frames import Comparison
from fedlora.report.views import Cell, Table

MOST = 10
"""Prompts that are shown."""
_LONGEST = 400
"""Signs of a text that are shown."""
_KEYS = ("run_id", "round", "row", "prompt", "reference")
_SAID = ("answer", "chosen", "chosen by length")


@dataclass(frozen=True)
class SideBySide:
    """The answers of a condition."""

    condition: str
    seed: str
    """Of the runs that are shown."""
    table: Table


def side_by_side(comparison: Comparison, decided: Decision) -> list[SideBySide]:
    """For each condition the answers after the last round, in the first seed that its choices share, and those before
    training; none where nothing was written."""
    return [found for condition in decided.conditions for found in _of(comparison.answers, condition)]


def _of(answers: pd.DataFrame, condition: Condition) -> Iterator[SideBySide]:
    shown = [each for each in (*condition.standings, *condition.controls) if _runs(answers, each)]
    if not shown:
        return
    seeds = sorted(set.intersection(*(set(_runs(answers, each)) for each in shown)), key=str)
    if not seeds:
        return
    runs = {each.choice: answers[answers["run_id"] == each.setting.seeds[seeds[0]]] for each in shown}
    last = {choice: rows[rows["round"] == rows["round"].max()] for choice, rows in runs.items()}
    common = sorted(set.intersection(*(set(rows["row"]) for rows in last.values())))[:MOST]
    if not common:
        return
    first = next(iter(runs.values()))
    columns = {"before training": first[first["round"] == 0], **last}
    body = [_row(row, columns, last) for row in common]
    table = Table(["prompt", "reference", *columns], body, "answers", narrow=("reference", *list(last)[:1]))
    yield SideBySide(condition.label, frames.plain(seeds[0]), table)


def _runs(answers: pd.DataFrame, standing: Standing) -> dict[object, str]:
    """Those runs of a choice that wrote, by seed."""
    known = set(answers["run_id"]) if "run_id" in answers else set()
    return {seed: run for seed, run in standing.setting.seeds.items() if run in known}


def _row(row: int, columns: dict[str, pd.DataFrame], last: dict[str, pd.DataFrame]) -> Sequence[Cell]:
    found = next(iter(last.values()))
    example = found[found["row"] == row].iloc[0]
    cells = [Cell(_short(example["prompt"])), Cell(_short(example["reference"]))]
    for rows in columns.values():
        own = rows[rows["row"] == row]
        cells.append(_said(own.iloc[0]) if len(own) else Cell(views.NONE))
    return cells


def _said(row: pd.Series) -> Cell:
    """What was written or chosen, and what each scorer gives for it; bold where the first gives all."""
    said = " / ".join(_short(row[name]) for name in _SAID if not frames.is_missing(row.get(name)))
    names = [str(name) for name in row.index if name not in (*_KEYS, *_SAID) and not frames.is_missing(row[name])]
    verdicts = ", ".join(f"{name} {row[name]:.2g}" for name in names)
    return Cell(f"{said or '(nothing)'} [{verdicts}]", strong=bool(names) and row[names[0]] == 1)


def _short(text: object) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]} …"
