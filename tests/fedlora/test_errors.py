"""Words that errors and reports share."""

import re
from pathlib import Path

import pytest

from fedlora.errors import counted, listed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("number", "words", "said"),
    [
        (1, ("round",), "1 round"),
        (0, ("round",), "0 rounds"),
        (8, ("client",), "8 clients"),
        (1, ("row is", "rows are"), "1 row is"),
        (2, ("class", "classes"), "2 classes"),
    ],
)
def test_a_count_and_its_noun_agree(number, words, said):
    assert counted(number, *words) == said


def test_no_text_of_ours_says_1_rounds():
    """`{n} rounds` in a text for people is wrong for one; `counted` is right for all."""
    wrong = re.compile(r"\{[^{}]+\} (?:clients|rounds|settings|weights|adapters|problems|directions)\b")
    found = [
        f"{path.relative_to(ROOT)}: {match.group(0)}"
        for folder in ("fedlora", "mlflow_tracking", "tasks", "flows")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for match in wrong.finditer(path.read_text("utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ([3], "3"),
        ([0, 1, 2, 3, 4], "0–4"),
        ([0, 1, 4, 7, 8], "0–1, 4, 7–8"),
        ([0, 2, 4, 6, 8, 9], "0 … 9 (6)"),
    ],
)
def test_which_numbers_in_words(numbers, words):
    assert listed(numbers) == words
