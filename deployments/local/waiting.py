"""Waiting for what takes its time: one way to ask again, give up, and say what is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

Report = Callable[[str], None]
_TOLD_EVERY_S = 5.0


def until(done: Callable[[], bool], deadline: float, every: float = 0.2) -> bool:
    """Ask until it is done; False where the time (of `time.monotonic`) is up first."""
    while not done():
        if time.monotonic() >= deadline:
            return False
        time.sleep(every)
    return True


def for_all(left: Callable[[], list[str]], deadline: float, report: Report, text: str = "{}") -> list[str]:
    """Ask until nothing is left, and say every five seconds what still is; returns that where the time is up first."""
    begun = told = time.monotonic()
    names: list[str] = []

    def done() -> bool:
        nonlocal names, told
        names, now = left(), time.monotonic()
        if names and now - told >= _TOLD_EVERY_S:
            told = now
            report(f"waiting for the {text.format(listing(names))} ({now - begun:.0f} s)")
        return not names

    until(done, deadline)
    return names


def listing(words: Iterable[str]) -> str:
    """`one, two and three`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
