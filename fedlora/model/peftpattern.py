"""PEFT's patterns of ranks and alphas, without its regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from fedlora.errors import AdapterError
from fedlora.files.limits import short

NAME = re.compile(r"\^?(?:[\w.\-]|\\[^\w\s])+\$?")
"""A module's name, or the end of one, also as PEFT's expressions have it."""


def chooses(target: str, module: str) -> bool:
    """Whether a plain name in PEFT's `target_modules` chooses a module: its whole name, or the end of it."""
    return module == target or module.endswith(f".{target}")


class Pattern:
    """PEFT's `rank_pattern` or `alpha_pattern`: values of modules by regular expressions for the end of their names, of
    which the first that fits counts.

    They come from strangers, so none is given to `re`, where some take for ever: names are looked up, and what PEFT's
    users write besides (`.*`, `\\d+`, `[0-3]`, `(q|v)_proj`) is followed one character at a time.

    Raises:
        AdapterError: not keys and values, or an expression beyond that.
    """

    _LONGEST = 500
    """Characters of all expressions that are not plain names."""
    _PIECE = re.compile(
        r"(?P<one>\\[dw]|\\[^\w\s]|\[\^?[\w\-]+\]|[\w.\-])(?P<times>[*+?]?)\??"
        r"|\((?:\?:)?(?P<words>(?:[\w.\-|]|\\[^\w\s])+)\)(?![*+?{])"
    )

    def __init__(self, pattern: Any) -> None:
        if pattern is not None and not isinstance(pattern, dict):
            raise AdapterError(f"a pattern of ranks or alphas is {short(pattern)}; expected keys and values")
        self._values = list((pattern or {}).values())
        self._names: dict[str, int] = {}
        self._expressions: list[tuple[int, bool, list[re.Match[str]]]] = []
        others = {key: place for place, key in enumerate(pattern or {}) if not NAME.fullmatch(key)}
        if sum(map(len, others)) > self._LONGEST:
            raise AdapterError("the regular expressions of its patterns are too long; name the modules instead")
        for place, key in enumerate(pattern or {}):
            if key not in others:
                self._names.setdefault(key.removesuffix("$").replace("\\", ""), place)
            for part in key.split("|") if "(" not in key else [key]:
                if key in others:
                    self._expressions.append((place, part.startswith("^"), self._pieces(part)))

    def of(self, module: str, default: Any) -> Any:
        """The value of a module."""
        starts = [0, *(place + 1 for place, letter in enumerate(module) if letter == ".")]
        found = [self._names.get(f"^{module}"), *(self._names.get(module[start:]) for start in starts)]
        for place, whole, pieces in self._expressions:
            places = {0} if whole else set(starts)
            for piece in pieces:
                places = _after(piece, module, places)
            if len(module) in places:
                found.append(place)
        known = [place for place in found if place is not None]
        return self._values[min(known)] if known else default

    def _pieces(self, key: str) -> list[re.Match[str]]:
        text, pieces = key.removeprefix("^").removesuffix("$"), []
        while text:
            piece = self._PIECE.match(text)
            if piece is None:
                raise AdapterError(
                    f"pattern {short(key)} is not understood at {short(text[:20])}; name the modules instead"
                )
            pieces.append(piece)
            text = text[piece.end() :]
        return pieces


def _after(piece: re.Match[str], module: str, places: Iterable[int]) -> set[int]:
    """Where in a module's name one can be after a piece of an expression, coming from any of `places`."""
    if piece["words"]:
        words = piece["words"].replace("\\", "").split("|")
        return {place + len(word) for place in places for word in words if module.startswith(word, place)}
    here, after = set(places), set()
    for place, letter in enumerate(module):
        if _fits(piece["one"], letter) and (place in here or (place in after and piece["times"] in ("*", "+"))):
            after.add(place + 1)
    return after | here if piece["times"] in ("*", "?") else after


@lru_cache(maxsize=4096)
def _fits(one: str, letter: str) -> bool:
    try:
        return re.fullmatch(one, letter) is not None
    except re.error:
        return False
