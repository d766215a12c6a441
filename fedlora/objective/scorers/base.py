"""The contract of a scorer: what an answer is worth, beside a reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from fedlora.data.questions import Reference
from fedlora.errors import DataError, counted


class Scorer(ABC):
    """What an answer is worth: from 0 to 1, higher is better. A file each, called as in `evaluation.generate.scorers`.

    A plug-in's is found by the entry-point group `fedlora.scorers`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """What tables call the mean over answers."""
    expects: ClassVar[str]
    """What it needs of a test example, in words."""
    chooses: ClassVar[bool] = False
    """Whether the answer is the likeliest of the reference's options, and nothing is written."""
    by_length: ClassVar[bool] = False
    """Of one that chooses: whether an option's log-likelihood is divided by its length in bytes."""
    runs_code: ClassVar[bool] = False
    """Whether it runs what the model wrote (`evaluation.execute_code`)."""

    def fits(self, reference: Reference) -> bool:
        """Whether answers can be judged by a reference."""
        return bool(reference.answer.strip())

    @abstractmethod
    def judge(self, answer: str, reference: Reference) -> float:
        """What an answer is worth, from 0 to 1."""


def check(scorer: Scorer, references: Sequence[Reference]) -> None:
    """Refuse references that answers cannot be judged by.

    Raises:
        DataError: there are such; tells how many, and what was expected.
    """
    wrong = [reference for reference in references if not scorer.fits(reference)]
    if wrong:
        raise DataError(
            f"evaluation.generate.scorers={scorer.name} expects {scorer.expects}, and {len(wrong)} of "
            f"{counted(len(references), 'test example')} are without (the first response is {wrong[0].answer!r:.80}); "
            "choose another scorer, or mend the data"
        )
