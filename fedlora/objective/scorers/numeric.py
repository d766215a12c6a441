"""The same number."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import ClassVar

from fedlora.data.questions import Reference
from fedlora.objective.scorers.base import Scorer

_PLAIN = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?"
_NUMBER = re.compile(rf"[-+−]?{_PLAIN}(?:\s*/\s*{_PLAIN})?")
"""Digits with thousands separators or without, a decimal part, an exponent; or a fraction of two."""
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_FRACTION = re.compile(r"([-+−]?)\\[dt]?frac\s*\{\s*([-+−]?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}")
_CLOSE = Fraction(1, 10**6)


class Numeric(Scorer):
    """Whether answer and reference come to the same number, to a millionth of it: what stands after GSM8K's `####`,
    else in the last `\\boxed{…}`, else the last number. Thousands separators, currencies and units (per cent is one)
    are no matter."""

    name: ClassVar[str] = "numeric"
    title: ClassVar[str] = "right numbers"
    expects: ClassVar[str] = "a number in the response"

    def fits(self, reference: Reference) -> bool:
        return number(reference.answer) is not None

    def judge(self, answer: str, reference: Reference) -> float:
        found, wanted = number(answer), number(reference.answer)
        if found is None or wanted is None:
            return 0.0
        return float(abs(found - wanted) <= _CLOSE * abs(wanted))


def number(text: str) -> Fraction | None:
    """The number that a text comes to; None without any."""
    if "####" in text:
        parts = _numbers(text.rsplit("####", 1)[1])
        return parts[0] if parts else None
    boxed = _BOXED.findall(text)
    found = _numbers(boxed[-1] if boxed else text)
    return found[-1] if found else None


def _numbers(text: str) -> list[Fraction]:
    plain = _FRACTION.sub(r"\1\2/\3", text)
    return [value for match in _NUMBER.finditer(plain) if (value := _value(match, plain)) is not None]


def _value(match: re.Match[str], text: str) -> Fraction | None:
    written = match.group().replace(",", "").replace("−", "-").replace(" ", "")
    if written[0] in "+-" and match.start() and (text[match.start() - 1].isalnum() or text[match.start() - 1] in ")]"):
        written = written[1:]  # 7-3: a difference, no negative number
    try:
        upper, _, lower = written.partition("/")
        return Fraction(upper) / Fraction(lower) if lower else Fraction(upper)
    except (ValueError, ZeroDivisionError):
        return None
