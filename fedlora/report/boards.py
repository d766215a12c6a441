"""A decision as tables: the cells of the page, and what is written as CSV."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from fedlora.report import frames, views, wording
from fedlora.report.costs import COSTS, HIDDEN
from fedlora.report.decision import Condition, Decision, Standing
from fedlora.report.measures import Measures
from fedlora.report.views import Cell, Table, p_value, shown, spread

_NOTHING = Cell(views.NONE, math.inf)
_MOST_CONDITIONS = 8
"""Of more conditions the scores in each are hidden until asked for: places and regrets say what they come to."""
_RESULTS = {"gap": "gap", "rho_first": "ρ round 1", "rho_last": "ρ last", "rho_floor": "ρ floor"}


def leaderboard(condition: Condition) -> Table:
    """The choices of a condition, the best score first; below them the controls, which are no candidates.

    What is bold in the first column is the best and what is not told apart from it.
    """
    score, second = condition.criterion.title, second_view(condition)
    titles = ["choice", score, f"{wording.below(condition.criterion)} the best", "p (Holm)", "seeds to tell"]
    titles += [
        *(cost.title for cost in COSTS.values()),
        "worst client",
        *_RESULTS.values(),
        *second,
        "of the possible",
    ]
    lines = [_line(each, each in condition.alike) for each in (*condition.standings, *condition.controls)]
    if all(line[-1] is _NOTHING for line in lines):  # the two that tell what is possible did not run
        titles, lines = titles[:-1], [line[:-1] for line in lines]
    hidden = (*second, *HIDDEN)
    return Table(titles, lines, "leaderboard", hidden=hidden, narrow=(score, "MB"))


def second_view(condition: Condition) -> tuple[str, str]:
    """Columns of the second view of the interval: over seeds drawn again, and over seeds and clients drawn again."""
    score = condition.criterion.title
    return f"{score}, bootstrap", f"clients' own {score}, bootstrap"


def _line(each: Standing, alike: bool) -> list[Cell]:
    best = each.paired is None
    below = Cell("best", 0.0) if best else shown(each.regret)
    control = math.isnan(each.place)
    unsettled = each.more is not None and not each.apart and not control
    more = Cell(f"{each.more} more", each.more) if unsettled else _NOTHING
    name = views.name(each.setting, each.choice + (" (control)" if control else ""), strong=alike)
    costs = [shown(each.costs[key], cost.digits) for key, cost in COSTS.items()]
    others = [shown(each.results[key].mean) for key in ("worst_client", *_RESULTS)]
    possible = _NOTHING if math.isnan(each.possible) else Cell(f"{each.possible:.0%}".replace("-", "−"), each.possible)
    second = [spread(each.redrawn), spread(each.clients)]
    return [name, spread(each.score), below, p_value(each.holm), more, *costs, *others, *second, possible]


def paired(condition: Condition) -> Table:
    """Differences from the best of a condition, seed by seed: mean, interval, p-values."""
    titles = ("choice", "common seeds", "difference", "95 % interval", "p", "p (Holm)", "note")
    body = []
    for each in condition.standings:
        if each.paired:
            found = each.paired.difference
            limits = f"{shown(found.low).text} to {shown(found.high).text}" if found.known else views.NONE
            numbers = [Cell(str(found.n), found.n), shown(found.mean, 4, sign=True), Cell(limits, found.low)]
            tests = [p_value(each.paired.p), p_value(each.holm)]
            body.append([views.name(each.setting, each.choice), *numbers, *tests, Cell(each.paired.why)])
    return Table(titles, body, "paired", narrow=("difference", "p (Holm)"))


def across(decision: Decision) -> Table:
    """A row per choice, its mean score in each condition; bold where it is the best or not told apart from it."""
    labels = [condition.label for condition in decision.conditions]
    titles = ["choice", *labels, "mean place", "mean regret", "worst regret", "wins", "ties", "losses"]
    body = []
    for overall in decision.overall:
        cells, setting = [], None
        for condition in decision.conditions:
            own = next((each for each in condition.standings if each.choice == overall.choice), None)
            setting = setting or (own.setting if own else None)
            cells.append(
                Cell(shown(own.score.mean).text, own.score.mean, strong=own in condition.alike) if own else _NOTHING
            )
        assert setting is not None
        numbers = [shown(overall.mean_place, 2), shown(overall.mean_regret), shown(overall.worst_regret)]
        counts = [Cell(str(count), count) for count in (overall.wins, overall.ties, overall.losses)]
        body.append([views.name(setting, overall.choice), *cells, *numbers, *counts])
    hidden = labels if len(labels) > _MOST_CONDITIONS else ()
    return Table(titles, body, "across", hidden, narrow=("mean place", "mean regret", "worst regret"))


def measured(found: Measures) -> Table:
    """Scores at a budget, what the target costs, and the area under the curve, a row per choice."""
    score = found.criterion
    titles = ["choice", f"{score.title} at the MB", f"{score.title} at the seconds"]
    titles += [f"{what} to the target" for what in ("rounds", "MB", "seconds")]
    titles += ["mean over rounds", "worst client", f"{10 if score.higher_is_better else 90}th percentile"]
    body = []
    for each in found.choices:
        results = each.standing.results
        scores = [shown(each.at_megabytes), shown(each.at_seconds)]
        spent = [_until(each.rounds_to, 1), _until(each.megabytes_to, 2), _until(each.seconds_to, 1)]
        clients = [shown(results[name].mean) for name in ("worst_client", "p10_client")]
        name = views.name(each.standing.setting, each.standing.choice)
        body.append([name, *scores, *spent, shown(each.area), *clients])
    return Table(titles, body, "measured", narrow=(titles[1], titles[4]))


def budgets(found: Measures) -> str:
    """The budgets and the target of `measured`, in words; those that are not known are left out."""
    spent = ((found.megabytes, "MB"), (found.seconds, "s"))
    known = [f"{value:.3g} {unit}" for value, unit in spent if not math.isnan(value)]
    budget = f"Budget: {' or '.join(known)}. " if known else ""
    target = "" if math.isnan(found.target) else f"Target: {found.target:.3f}."
    return f"{budget}{target}".strip()


def _until(value: float, digits: int) -> Cell:
    return Cell("not reached", value) if math.isinf(value) else shown(value, digits)


def leaderboard_frame(decision: Decision) -> pd.DataFrame:
    """All conditions as they are written to CSV: place, mean and interval of every result, costs."""
    table, score = [], decision.criterion.name
    for condition, each in _standings(decision):
        entry: dict[str, Any] = {"condition": condition.label, "place": each.place, "choice": each.choice}
        entry |= {"setting": each.setting.label, **each.setting.values}
        entry |= {"seeds": " ".join(frames.plain(seed) for seed in each.setting.seeds), "n": len(each.setting.seeds)}
        for name, found in each.results.items():
            entry |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        extra = {name: each.costs[name] for name in COSTS if name not in entry}
        second = {
            f"{score}_bootstrap_low": each.redrawn.low,
            f"{score}_bootstrap_high": each.redrawn.high,
            f"clients_{score}": each.clients.mean,
            f"clients_{score}_low": each.clients.low,
            f"clients_{score}_high": each.clients.high,
        }
        table.append(entry | extra | {"regret": each.regret, "of_the_possible": each.possible} | second)
    return pd.DataFrame(table)


def paired_frame(decision: Decision) -> pd.DataFrame:
    """Differences in score from the best of the condition, with p-values before and after Holm's correction."""
    columns = ("condition", "choice", "best", "n", "difference", "low", "high", "p", "p_holm", "more_seeds", "note")
    table = []
    for condition, each in _standings(decision):
        if each.paired is not None and each in condition.standings:
            found = each.paired.difference
            numbers = (found.n, found.mean, found.low, found.high, each.paired.p, each.holm, each.more)
            table.append((condition.label, each.choice, condition.best.choice, *numbers, each.paired.why))
    return pd.DataFrame(table, columns=columns)


def _standings(decision: Decision) -> list[tuple[Condition, Standing]]:
    return [(c, each) for c in decision.conditions for each in (*c.standings, *c.controls)]
