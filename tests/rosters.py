"""Which strategies a test is for: what its parameters are made of."""

from collections.abc import Iterable

import pytest

from fedlora.strategies import registry

NAMES = list(registry._BUILTIN)
ALONE = {"local", "centralised"}
"""Under these nothing is combined: what a client holds, or the only client there is, is its own."""


def names(but: Iterable[str] = (), of: Iterable[str] = NAMES) -> list[str]:
    """All of these strategies, but some."""
    return [name for name in of if name not in set(but)]


def entries(but: Iterable[str] = (), mixed_but: Iterable[str] = (), of: Iterable[str] = NAMES) -> list:
    """(strategy, whether ranks are mixed): each with clients of one rank, and of several where it is not refused.

    Args:
        but: strategies that are left out.
        mixed_but: strategies that are left out where ranks are mixed.
        of: the strategies to begin with.
    """
    found = [(name, mixed) for name in names(but, of) for mixed in (False, True)]
    return [
        pytest.param(each, id=f"{each[0]}-{'mixed' if each[1] else 'equal'}")
        for each in found
        if not each[1] or not (registry.find(each[0]).traits.one_rank or each[0] in set(mixed_but))
    ]


CHANGE_THE_BASE = [name for name in NAMES if registry.find(name).traits.changes_base]
TRAIN_A_CORE = [name for name in NAMES if registry.find(name).traits.trains_core]
