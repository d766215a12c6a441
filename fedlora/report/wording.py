"""What a report calls the score that decides, and which way of it is better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.objective import Score


def title(criterion: Score) -> str:
    """At the beginning of a sentence."""
    return criterion.title[:1].upper() + criterion.title[1:]


def axis(criterion: Score, before: str = "final test") -> str:
    """Of an axis, with its unit."""
    return f"{before} {criterion.title} ({criterion.unit})"


def below(criterion: Score) -> str:
    """Where what is worse lies."""
    return "below" if criterion.higher_is_better else "above"


def above(criterion: Score) -> str:
    """Where what is better lies."""
    return "above" if criterion.higher_is_better else "below"


def best(criterion: Score) -> str:
    """Of the score that nothing is better than."""
    return "highest" if criterion.higher_is_better else "best"


def more(criterion: Score) -> str:
    """What more of it is, where that is better."""
    return "more" if criterion.higher_is_better else "less"


def less(criterion: Score) -> str:
    """The other way."""
    return "less" if criterion.higher_is_better else "more"


def worse(criterion: Score) -> str:
    """What it did that is a regression."""
    return "fell" if criterion.higher_is_better else "rose"


def better(criterion: Score) -> str:
    """What it did that is none."""
    return "rose" if criterion.higher_is_better else "fell"


def cut(criterion: Score) -> str:
    """Where its intervals end, as it cannot leave these."""
    ends = [f"{end:g}".replace("-", "−") for end in (criterion.low, criterion.high) if math.isfinite(end)]
    return f", cut at {' and '.join(ends)}" if ends else ""
