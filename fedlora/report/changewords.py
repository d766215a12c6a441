"""What changed, in words, as JSON, as tables, and as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from fedlora.errors import counted
from fedlora.report import marks, plots, views, wording
from fedlora.report.changes import PAIRED, Cell, Change, Changes
from fedlora.report.costs import COSTS, HIDDEN
from fedlora.report.decision import ALPHA
from fedlora.report.marks import Figure, Look, Trace
from fedlora.report.statistics import Interval
from fedlora.report.views import Table

_SHOWN = 4
"""Cells, settings or costs that are named."""
TERMINAL = ("choice", "before", "after", "difference", "test", "p (Holm)", "MB", "note")
"""The columns of `table` for which a terminal has room."""


def sentences(changes: Changes) -> list[str]:
    """What changed: scores that are worse or better beyond noise, what else differs, what only one of the two has."""
    said = [_moved(words, cells, changes) for words, cells in _directions(changes)]
    if not changes.worse and not changes.better:
        said = [_nothing(changes)]
    said += [_settings(changes), _dealt(changes), _costs(changes)]
    for name, only in ((changes.before, changes.only_before), (changes.after, changes.only_after)):
        said.append(f"Only in {name}: {_listed(only)}." if only else "")
    return [sentence for sentence in said if sentence]


def headline(changes: Changes) -> str:
    """One line: how many fell and rose beyond noise since when."""
    since = f"since {changes.before}"
    moved = _directions(changes)
    known = [f"{_listed([cell.label for cell in cells])} {words} beyond noise" for words, cells in moved if cells]
    return f"{'; '.join(known) if known else 'no score changed beyond noise'} {since}"


def _directions(changes: Changes) -> list[tuple[str, list[Cell]]]:
    """The cells that are worse beyond noise and those that are better, each with the word for it; where lower is
    better, it says which is which."""
    by = changes.criterion
    said = ("", "") if by.higher_is_better else (", which is worse,", ", which is better,")
    return [(f"{wording.worse(by)}{said[0]}", changes.worse), (f"{wording.better(by)}{said[1]}", changes.better)]


def _moved(word: str, cells: Sequence[Cell], changes: Changes) -> str:
    if not cells:
        return ""
    first = sorted(cells, key=lambda cell: -abs(cell.score.difference))
    told = "; ".join(_told(cell) for cell in first[:_SHOWN])
    more = f"; and {len(first) - _SHOWN} more" if len(first) > _SHOWN else ""
    how = f"{len(cells)} of {counted(len(changes.cells), 'score')} {word} beyond noise"
    return f"{how} (p < {ALPHA} after Holm over {counted(changes.tests, 'test')}): {told}{more}."


def _told(cell: Cell) -> str:
    score = cell.score
    p = views.p_value(score.holm).text
    return (
        f"{cell.label} {score.before.mean:.3f} → {score.after.mean:.3f} ({_difference(score)}; {_test(score)}, "
        f"p {p if p.startswith('<') else f'= {p}'})"
    )


def _difference(change: Change) -> str:
    found = change.found.difference
    text = views.shown(found.mean, sign=True).text
    if not found.known:
        return text
    return f"{text}, {views.shown(found.low, sign=True).text} to {views.shown(found.high, sign=True).text}"


def _test(change: Change) -> str:
    if change.test == PAIRED:
        return f"paired over {counted(change.found.difference.n, 'seed')}"
    return f"Welch, {change.before.n} and {counted(change.after.n, 'seed')}"


def _nothing(changes: Changes) -> str:
    """That no score changed, and what is known of that."""
    tested = [cell for cell in changes.cells if not math.isnan(cell.score.holm)]
    equal = [cell for cell in changes.cells if cell.score.found.why == "equal in every seed"]
    said = [f"No score changed beyond noise, of {len(changes.cells)}"]
    if equal:
        said.append(f"{len(equal)} {'is' if len(equal) == 1 else 'are'} the same to the last digit in every seed")
    if tested:
        lowest = min(tested, key=lambda cell: cell.score.found.p)
        p = views.p_value(lowest.score.holm).text
        said.append(f"nearest to it {lowest.label}, {_difference(lowest.score)} ({_test(lowest.score)}, p = {p})")
    if left := len(changes.cells) - len(tested) - len(equal):
        why = next(cell.score.found.why for cell in changes.cells if cell not in (*tested, *equal))
        said.append(f"{left} could not be tested ({why})")
    return "; ".join(said) + "."


def _settings(changes: Changes) -> str:
    if not changes.settings:
        return "Both ran with the same settings."
    told = [f"{each.key} {each.before or views.NONE} → {each.after or views.NONE}" for each in changes.settings]
    return f"Settings that differ: {_listed(told)}."


def _dealt(changes: Changes) -> str:
    if not changes.dealt:
        return ""
    seeds = "seed" if len(changes.dealt) == 1 else "seeds"
    return (
        f"The partition is another one in {seeds} {', '.join(changes.dealt)}: data or dealing changed, and runs of one "
        "seed are no pairs."
    )


def _costs(changes: Changes) -> str:
    told = [
        f"{cell.label} {cell.costs[name].before.mean:.3g} → {cell.costs[name].after.mean:.3g} {COSTS[name].title}"
        for cell in changes.cells
        for name in cell.dearer_or_cheaper
    ]
    return f"Costs that differ: {_listed(told)}." if told else "No cost differs beyond noise."


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else "")


def table(changes: Changes, condition: str) -> Table:
    """The cells of a condition: both scores, their difference and its test, and the costs before and after."""
    costs = [cost.title for cost in COSTS.values()]
    titles = ["choice", "before", "after", "difference", "95 % interval", "test", "p", "p (Holm)", *costs, "note"]
    body = [_row(cell) for cell in changes.cells if cell.condition == condition]
    return Table(
        titles,
        body,
        "changes",
        hidden=("p", *HIDDEN),
        narrow=("difference", "p (Holm)"),
    )


def _row(cell: Cell) -> list[views.Cell]:
    score, found = cell.score, cell.score.found.difference
    name = views.Cell(cell.choice, None, plots.colour(cell.strategy), strong=score.beyond)
    limits = f"{views.shown(found.low).text} to {views.shown(found.high).text}" if found.known else views.NONE
    shown = [views.spread(score.before), views.spread(score.after), views.shown(found.mean, 4, sign=True)]
    tests = [views.Cell(_test(score)), views.p_value(score.found.p), views.p_value(score.holm)]
    costs = [_cost(cell, key, cost.digits) for key, cost in COSTS.items()]
    return [name, *shown, views.Cell(limits, found.low), *tests, *costs, views.Cell(score.found.why)]


def _cost(cell: Cell, key: str, digits: int) -> views.Cell:
    """A cost before and after, in bold where it differs; once where it reads the same."""
    if key not in cell.costs:
        return views.shown(math.nan)
    before, after = (views.shown(found.mean, digits) for found in (cell.costs[key].before, cell.costs[key].after))
    text = after.text if before.text == after.text else f"{before.text} → {after.text}"
    return views.Cell(text, after.order, strong=key in cell.dearer_or_cheaper)


def settings(changes: Changes) -> Table:
    """The settings that differ, with both values."""
    rows = [
        [views.Cell(each.key), views.Cell(each.before or views.NONE), views.Cell(each.after or views.NONE)]
        for each in changes.settings
    ]
    return Table(("setting", "before", "after"), rows)


def frame(changes: Changes) -> pd.DataFrame:
    """A row per cell as it is written to CSV; what is not known is empty."""
    return pd.DataFrame([_entry(cell) for cell in changes.cells])


def _entry(cell: Cell) -> dict[str, Any]:
    score = cell.score
    ends = {
        key: value
        for name, found in (("before", score.before), ("after", score.after), ("difference", score.found.difference))
        for key, value in _ends(name, found).items()
    }
    seeds = {"seeds_before": score.before.n, "seeds_after": score.after.n}
    tested = {"test": score.test, "p": score.found.p, "p_holm": score.holm, "note": score.found.why}
    costs = {
        f"{name}_{when}": getattr(cost, when).mean for name, cost in cell.costs.items() for when in ("before", "after")
    }
    direction = "fell" if cell.fell else "rose" if cell.rose else ""
    return {
        "condition": cell.condition,
        "choice": cell.choice,
        "changed": direction,
        **ends,
        **seeds,
        **tested,
        **costs,
    }


def _ends(name: str, found: Interval) -> dict[str, float]:
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def to_json(changes: Changes) -> dict[str, Any]:
    """What changed, for machines: words, cells, settings that differ; NaN as null."""
    cells = [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in _entry(cell).items()}
        | {"costs_that_differ": cell.dearer_or_cheaper}
        for cell in changes.cells
    ]
    return {
        "before": changes.before,
        "after": changes.after,
        "verdict": sentences(changes),
        "regression": bool(changes.worse),
        "score": f"final {changes.criterion.title}",
        "higher_is_better": changes.criterion.higher_is_better,
        "alpha": ALPHA,
        "tests": changes.tests,
        "cells": cells,
        "settings": [vars(each) for each in changes.settings],
        "partitions_differ_in_seeds": list(changes.dealt),
        "only_before": list(changes.only_before),
        "only_after": list(changes.only_after),
    }


def figure(changes: Changes) -> Figure | None:
    """The change of every score with its interval, a panel per condition; None where nothing was measured."""
    every = zip(looks(changes), changes.cells, strict=True)
    known = [(look, cell) for look, cell in every if not math.isnan(cell.score.difference)]
    if not known:
        return None
    rows = max(sum(cell.condition == other.condition for _, cell in known) for _, other in known)
    by = changes.criterion
    x = marks.axis(wording.axis(by, "change of final test"), zeroline=True, zerolinecolor="#8a94a0")
    axes = marks.layout(x, marks.axis("", autorange="reversed", type="category"), hovermode="closest")
    caption = (
        "After minus before with the 95 % interval of the difference, where there is one; "
        f"{'right' if by.higher_is_better else 'left'} of the line is better."
    )
    traces = [_change(look, cell) for look, cell in known]
    return Figure(
        "changes",
        f"Change of {by.title}",
        caption,
        traces,
        axes,
        wide=True,
        height=130 + 22 * rows,
        panels=changes.conditions,
        row=max(22 * rows, 90),
    )


def _change(look: Look, cell: Cell) -> Trace:
    found = cell.score.found.difference
    bars: Trace = {"error_x": {**marks.bars([found]), "thickness": 1.5, "width": 4}} if found.known else {}
    words = f"{cell.score.before.mean:.3f} → {cell.score.after.mean:.3f}"
    return look.line(
        of=_test(cell.score),
        x=[marks.number(found.mean)],
        y=[marks.safe(cell.choice)],
        mode="markers",
        marker={"color": look.colour, "symbol": look.symbol, "size": 9},
        **bars,
        showlegend=False,
        hovertemplate=f"{marks.safe(cell.label)}<br>{words}<br>{marks.safe(_difference(cell.score))}<extra></extra>",
    )


def looks(changes: Changes) -> list[Look]:
    """How every cell is drawn, in order."""
    rests = list(dict.fromkeys(cell.rest for cell in changes.cells))
    panels = changes.conditions
    return [
        Look(
            cell.choice,
            cell.strategy,
            cell.rest,
            rests.index(cell.rest),
            panels.index(cell.condition) if panels else None,
        )
        for cell in changes.cells
    ]
