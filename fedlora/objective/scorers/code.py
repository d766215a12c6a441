"""Code that passes the tests which come with a problem (MBPP, HumanEval)."""

from __future__ import annotations

import re
from typing import ClassVar

from fedlora.data.questions import Reference
from fedlora.errors import ConfigError
from fedlora.objective.scorers import sandbox
from fedlora.objective.scorers.base import Scorer

_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_CHECKED = re.compile(r"^\s*check\((\w+)\)\s*$")


class Code(Scorer):
    """Whether an answer's Python passes the tests of its problem: its first fenced block, or all of it. It is run in a
    process of its own (`fedlora.objective.scorers.sandbox`)."""

    name: ClassVar[str] = "code"
    title: ClassVar[str] = "tests passed"
    expects: ClassVar[str] = "tests (a list of Python statements, data.tests)"
    runs_code: ClassVar[bool] = True

    def __init__(self) -> None:
        if (reason := sandbox.unfit()) is not None:
            raise ConfigError(f"evaluation.generate.scorers=code cannot limit what it runs here: {reason}")

    def fits(self, reference: Reference) -> bool:
        return bool(reference.tests)

    def judge(self, answer: str, reference: Reference) -> float:
        return float(sandbox.run(program(answer, reference)) is None)


def program(answer: str, reference: Reference) -> str:
    """What is run: the code of an answer, then the tests. Where these `check` a function that the answer does not
    define, as in HumanEval, the answer goes on where the question ends."""
    fenced = _FENCED.search(answer)
    code = fenced.group(1) if fenced else answer
    checked = _CHECKED.match(reference.tests[-1])
    if checked and f"def {checked.group(1)}(" not in code:
        code = reference.question + code
    return "\n".join([code, *reference.tests, ""])
