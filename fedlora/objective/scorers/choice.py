"""The likeliest of some options."""

from __future__ import annotations

from typing import ClassVar

from fedlora.data.questions import MOST_OPTIONS, Reference
from fedlora.objective.scorers.base import Scorer


class Choice(Scorer):
    """Whether the option that the model thinks likeliest is the reference: by the log-likelihood of its tokens after
    the prompt, without the end mark. The options are those of a column (`data.options`), or else the responses that the
    training set has, where these are few."""

    name: ClassVar[str] = "choice"
    title: ClassVar[str] = "right choices"
    expects: ClassVar[str] = (
        f"options with the response among them (data.options, or at most {MOST_OPTIONS} different training responses)"
    )
    chooses: ClassVar[bool] = True

    def fits(self, reference: Reference) -> bool:
        return len(reference.options) > 1 and reference.answer in reference.options

    def judge(self, answer: str, reference: Reference) -> float:
        return float(answer == reference.answer)


class ChoiceNormalised(Choice):
    """The same with log-likelihoods by byte, so that a long option is not held to be unlikely for its length."""

    name: ClassVar[str] = "choice-normalised"
    title: ClassVar[str] = "right choices (by length)"
    by_length: ClassVar[bool] = True
