"""What a comparison comes to, in words and as JSON: which choice to take where, because of what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedlora.errors import counted
from fedlora.report import frames, views, wording
from fedlora.report.costs import COSTS
from fedlora.report.decision import ALPHA, Condition, Decision, Overall, Standing
from fedlora.report.statistics import FEWEST, Interval

_SHOWN = 4
"""Conditions that are told one by one, and choices that are named."""


def sentences(decision: Decision) -> list[str]:
    """The verdict: a sentence or two for each condition, then what holds across them, then what would settle it."""
    said = [_of_condition(condition) for condition in decision.conditions[:_SHOWN]]
    if len(decision.conditions) > _SHOWN:
        said.append(f"{counted(len(decision.conditions) - _SHOWN, 'further condition')}: see the table.")
    if len(decision.conditions) > 1:
        said.append(_across(decision))
    return [*said, *_missing(decision)]


def _of_condition(condition: Condition) -> str:
    where = f"At {condition.label}: " if condition.label else ""
    best, others = condition.best, [each for each in condition.standings if each is not condition.best]
    if not others:
        return f"{where}{best.choice} alone ran, {score(best.score)}: there is nothing to compare it with."
    said = [f"{where}{_recommended(condition, others)}", _price(best), *_equals(condition), *_scale(condition)]
    return " ".join(filter(None, said))


def _recommended(condition: Condition, others: Sequence[Standing]) -> str:
    """What has the best score, and by how much it leads."""
    best, tested = condition.best, [each for each in others if not math.isnan(each.holm)]
    criterion = condition.criterion
    reached, above = f"{criterion.title} {score(best.score)}", wording.above(criterion)
    first = f"{best.choice} has the {wording.best(criterion)} score, {reached}"
    nearest = min(others, key=lambda each: each.regret if not math.isnan(each.regret) else math.inf)
    if best.score.n < 2:
        lead = "equal to" if nearest.regret == 0 else f"{amount(nearest.regret)} {above}"
        return (
            f"{first}, {lead} {nearest.choice}, in one seed each: how much of "
            f"that is the seed cannot be told; {FEWEST} seeds of each would begin to."
        )
    if not tested:
        why = next((each.paired.why for each in others if each.paired and each.paired.why), "no common seeds")
        return f"{first}; nothing could be tested ({why})."
    if not condition.equals:
        worst = views.p_value(max(each.holm for each in others)).text
        return (
            f"take {best.choice}: {reached}, {amount(nearest.regret)} {above} {nearest.choice}, the next "
            f"(p {worst if worst.startswith('<') else f'= {worst}'} against every other)."
        )
    beaten = len(others) - len(condition.equals)
    rest = f", better than {beaten} of {len(others)}" if beaten else ""
    return f"{first}{rest}."


def _equals(condition: Condition) -> list[str]:
    """What it cannot be told apart from, what of that is cheapest, and what would settle it."""
    equals = condition.equals
    if not equals or condition.best.score.n < 2:
        return []
    sign = -condition.criterion.sign
    named = [
        f"{each.choice} ({views.shown(sign * each.regret, sign=True).text}{_settled(each)})" for each in equals[:_SHOWN]
    ]
    more = f" and {len(equals) - _SHOWN} more" if len(equals) > _SHOWN else ""
    said = [f"With {counted(condition.best.score.n, 'seed')} it cannot be told apart from {', '.join(named)}{more}."]
    cheapest = min(condition.alike, key=lambda each: _or_highest(each.costs["megabytes"]))
    sent, least = condition.best.costs["megabytes"], cheapest.costs["megabytes"]
    if cheapest is not condition.best and least < 0.95 * sent:
        said.append(f"Of these take {cheapest.choice}: it sends least ({least:.1f} MB).")
    else:
        said.append(f"Of these {condition.best.choice} is a good choice: none sends less.")
    return said


def _settled(standing: Standing) -> str:
    if standing.more is None:
        return f"; {standing.paired.why}" if standing.paired and standing.paired.why else ""
    return f"; about {counted(standing.more, 'more seed')} would do" if standing.more <= 100 else ""


def _price(best: Standing) -> str:
    known = [(cost.said, best.costs[name]) for name, cost in COSTS.items() if cost.said]
    parts = [words.format(spent) for words, spent in known if not math.isnan(spent)]
    return f"It costs {', '.join(parts)}." if parts else ""


def _scale(condition: Condition) -> list[str]:
    """How much of what was possible it reaches; and a warning where no aggregation at all does as well."""
    said = []
    if condition.best.possible >= 0:  # nor where it is not known
        said.append(f"That is {condition.best.possible:.0%} of the way from local training to the oracle.")
    for control in condition.controls:
        if control.setting.strategy == "local" and control.regret <= 0:
            least = wording.less(condition.criterion)
            said.append(f"Without aggregation (local) clients reach no {least}: {score(control.score)}.")
    return said


def _across(decision: Decision) -> str:
    whole = [each for each in decision.overall if each.conditions == len(decision.conditions)]
    if not whole:
        return "No choice ran in every condition, so none can be recommended for all of them."
    first = whole[0]
    count = len(decision.conditions)
    said = f"For {'both' if count == 2 else f'all {count}'} conditions: {first.choice}, {_regret(first, decision)}"
    alike = [each for each in whole[1:] if each.mean_regret - first.mean_regret <= 0.001]
    return f"{said}; much the same: {', '.join(each.choice for each in alike[:_SHOWN])}." if alike else f"{said}."


def _regret(found: Overall, decision: Decision) -> str:
    if found.worst_regret == 0:
        return "the best in each of them"
    below = wording.below(decision.criterion)
    return f"on average {amount(found.mean_regret)} {below} the best of each, at worst {amount(found.worst_regret)}"


def _missing(decision: Decision) -> list[str]:
    if not decision.missing:
        return []
    names = ", ".join(decision.missing[:_SHOWN])
    return [f"Not run in every condition: {names}{' and others' if len(decision.missing) > _SHOWN else ''}."]


def score(found: Interval) -> str:
    """`0.652 (0.641 to 0.663, 5 seeds)`; the two values where there are two; one alone."""
    if found.n == 2:
        return f"{found.mean:.3f} ({found.values[0]:.3f} and {found.values[1]:.3f})"
    return (
        f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f}, {found.n} seeds)"
        if found.known
        else f"{found.mean:.3f}"
    )


def amount(value: float) -> str:
    """A difference without its sign, with three decimals."""
    return f"{abs(value):.3f}"


def _or_highest(value: float) -> float:
    return math.inf if math.isnan(value) else value


def to_json(decision: Decision) -> dict[str, Any]:
    """The verdict for machines: words, conditions with their standings, choices across conditions; NaN as null."""
    return {
        "verdict": sentences(decision),
        "score": f"final {decision.criterion.title}",
        "higher_is_better": decision.criterion.higher_is_better,
        "alpha": ALPHA,
        "choices": list(decision.choices),
        "conditions": [
            {
                "condition": condition.label,
                "values": {key: frames.plain(value) for key, value in condition.values.items()},
                "best": condition.best.choice,
                "not_told_apart": [each.choice for each in condition.equals],
                "standings": [_standing(each) for each in condition.standings],
                "controls": [_standing(each) for each in condition.controls],
            }
            for condition in decision.conditions
        ],
        "overall": [vars(each) for each in decision.overall],
    }


def _standing(found: Standing) -> dict[str, Any]:
    numbers = {
        "score": found.score.mean,
        "low": found.score.low,
        "high": found.score.high,
        "place": found.place,
        "regret": found.regret,
        "p_holm": found.holm,
        "share_of_the_possible": found.possible,
        **found.costs,
    }
    known = {name: None if math.isnan(value) else value for name, value in numbers.items()}
    return {"choice": found.choice, "seeds": found.score.n, "more_seeds": found.more, **known}
