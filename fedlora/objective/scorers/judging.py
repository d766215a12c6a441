"""What answers come to: the sum of their worth by each scorer, and some of them to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlora.data.questions import Questions
from fedlora.objective.scorers.base import Scorer


@dataclass(frozen=True)
class Judged:
    """Of some answers; those of parts add up to those of the whole."""

    sums: Mapping[str, float] = field(default_factory=dict)
    """What they are worth together, by a scorer's name."""
    count: int = 0
    shown: tuple[Mapping[str, Any], ...] = ()
    """Some of them: `row` (of the test set), `prompt`, `answer` and what was chosen, `reference`, and by the scorers'
    names what they are worth."""

    def __add__(self, other: Judged) -> Judged:
        names = dict.fromkeys([*self.sums, *other.sums])
        sums = {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names}
        return Judged(sums, self.count + other.count, self.shown + other.shown)

    def values(self) -> dict[str, float]:
        """The mean by each scorer, under its metric's name, and how many answers these are of."""
        if not self.count:
            return {}
        means = {metric_of(name): total / self.count for name, total in self.sums.items()}
        return {**means, "answers": float(self.count)}

    def to_json(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "count": self.count, "shown": list(self.shown)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Judged:
        """Raises:
        KeyError, TypeError, ValueError: these are no such judgements.
        """
        sums, count, shown = content["sums"], content["count"], content["shown"]
        if type(count) is not int or count < 0 or type(sums) is not dict or type(shown) is not list:
            raise ValueError("judgements are sums, a count and a list")
        if any(type(total) is not float or not 0 <= total <= count for total in sums.values()):
            raise ValueError("an answer is worth from 0 to 1")
        return cls(sums, count, tuple(shown))


def judged(scorers: Mapping[Scorer, Sequence[str]], asked: Questions, show: Sequence[int]) -> Judged:
    """Judge answers.

    Args:
        scorers: with the answers that each is to judge, in the order of what was asked.
        asked: the questions.
        show: rows of the test set whose answers are kept.
    """
    verdicts = {
        scorer.name: [scorer.judge(answer, known) for answer, known in zip(answers, asked.references, strict=True)]
        for scorer, answers in scorers.items()
    }
    said = {column_of(scorer): answers for scorer, answers in scorers.items()}
    shown = [
        {
            "row": row,
            "prompt": asked.references[i].question,
            **{column: answers[i] for column, answers in said.items()},
            "reference": asked.references[i].answer,
            **{name: found[i] for name, found in verdicts.items()},
        }
        for i, row in enumerate(asked.rows)
        if row in show
    ]
    return Judged({name: sum(found) for name, found in verdicts.items()}, len(asked), tuple(shown))


def column_of(scorer: Scorer) -> str:
    """What a table calls the answers that a scorer judges."""
    if not scorer.chooses:
        return "answer"
    return "chosen by length" if scorer.by_length else "chosen"


def metric_of(scorer: str) -> str:
    """What the mean by a scorer of that name is called among metrics."""
    return scorer.replace("-", "_")
