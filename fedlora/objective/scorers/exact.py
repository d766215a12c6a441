"""The same words."""

from __future__ import annotations

import string
import unicodedata
from typing import ClassVar

from fedlora.data.questions import Reference
from fedlora.objective.scorers.base import Scorer


class Exact(Scorer):
    """Whether answer and reference are the same text, whatever the case, the spaces and the punctuation at the ends
    (Unicode NFKC)."""

    name: ClassVar[str] = "exact"
    title: ClassVar[str] = "exact match"
    expects: ClassVar[str] = "a response"

    def judge(self, answer: str, reference: Reference) -> float:
        return float(normal(answer) == normal(reference.answer))


def normal(text: str) -> str:
    """A text without what `exact` looks over."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(string.punctuation + string.whitespace)
