"""Test examples as questions: what a model is asked before it answers, and what is known of a right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

    from fedlora.data.dialogues import Message
    from fedlora.data.turns import Turns

MOST_OPTIONS = 32
"""So many different responses of a training set may still be options to choose among."""
GIVEN = ("tests", "options")
"""Columns of lists of texts that a set may bring along."""


@dataclass(frozen=True)
class Reference:
    """What a test example asks, and what is known of a right answer."""

    question: str
    """What was said last before the answer."""
    answer: str
    """The response that comes with the example."""
    tests: tuple[str, ...] = ()
    """Python statements that fail on a wrong answer, for code."""
    options: tuple[str, ...] = ()
    """What to choose among."""


@dataclass(frozen=True)
class Questions:
    """Some rows of a test split: the prompts as token ids (int32), and their references."""

    asked: list[npt.NDArray[np.int32]]
    references: list[Reference]
    rows: list[int]

    def __len__(self) -> int:
        return len(self.asked)


def options_of(train: pa.Table) -> list[str]:
    """The different responses of a training set, where they are few enough to choose among; else none."""
    found = {_split(messages)[1] for messages in train["messages"].to_pylist()}
    return sorted(found) if len(found) <= MOST_OPTIONS else []


def references(split: pa.Table, options: Sequence[str]) -> list[Reference]:
    """What is known of right answers to a split: the last response of each dialogue, and what the set gives besides.

    Args:
        split: with a column `messages`, and of `GIVEN` what there is.
        options: of rows without any of their own.
    """
    given = {name: split[name].to_pylist() if name in split.column_names else [()] * len(split) for name in GIVEN}
    found = []
    for position, messages in enumerate(split["messages"].to_pylist()):
        before, answer = _split(messages)
        tests, own = (tuple(given[name][position] or ()) for name in GIVEN)
        found.append(Reference(before[-1]["content"] if before else "", answer, tests, own or tuple(options)))
    return found


def columns(split: pa.Table, turns: Turns, options: Sequence[str]) -> dict[str, Any]:
    """Columns by which a tokenised split can be read by `questions`: prompts as token ids, cut at the beginning to
    `turns.max_length`, and references."""
    import pyarrow as pa

    prompts = [turns.prompt(_split(messages)[0]) for messages in split["messages"].to_pylist()]
    asked = turns.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    known = references(split, options)
    texts = pa.list_(pa.large_string())
    return {
        "asked": pa.array([ids[-turns.max_length :] for ids in asked], pa.list_(pa.int32())),
        "question": pa.array([each.question for each in known], pa.large_string()),
        "answer": pa.array([each.answer for each in known], pa.large_string()),
        "tests": pa.array([each.tests for each in known], texts),
        "options": pa.array([each.options for each in known], texts),
    }


def questions(split: pa.Table, rows: Sequence[int]) -> Questions:
    """Some rows of a tokenised split, in that order."""
    taken = split.select(["asked", "question", "answer", *GIVEN]).take(list(rows)).to_pylist()
    asked = [np.array(row["asked"], dtype=np.int32) for row in taken]
    known = [Reference(row["question"], row["answer"], tuple(row["tests"]), tuple(row["options"])) for row in taken]
    return Questions(asked, known, list(rows))


def _split(messages: Sequence[Message]) -> tuple[Sequence[Message], str]:
    """What is said before the last response, and that."""
    last = max(position for position, each in enumerate(messages) if each["role"] == "assistant")
    return messages[:last], messages[last]["content"]
