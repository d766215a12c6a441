"""Which number a text comes to."""

from fractions import Fraction

import pytest

from fedlora.data.questions import Reference
from fedlora.objective.scorers.numeric import Numeric, number

NUMBERS = {
    "She sold 48/2 = <<48/2=24>>24 clips.\n#### 72": 72,
    "so it costs 1,234.50 dollars.": Fraction(2469, 2),
    "$5": 5,
    "the answer is -3.": -3,
    "10 - 7-3": 3,
    "x=-4": -4,
    r"Hence \boxed{\frac{1}{2}} of 12.": Fraction(1, 2),
    r"\boxed{1,000} of the 5": 1000,
    "3/4 of the 4 cakes? 3 / 4": Fraction(3, 4),
    "It is 1,000,000": 1_000_000,
    "12,34": 34,
    "−7": -7,
    ".5": Fraction(1, 2),
    "1e3": 1000,
    "20%": 20,
    "72 m": 72,
    "#### 12 apples and 5": 12,
    "no number": None,
    "1/0": None,
    "": None,
}


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_the_number_of_a_text(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    ("answer", "right"),
    [("The total is 1,200 km", 1), ("1200.0004", 1), ("1201", 0), ("it is -1200", 0), ("I do not know", 0)],
)
def test_answers_beside_a_reference_of_gsm8k(answer, right):
    assert Numeric().judge(answer, Reference("?", "4 * 300 = 1200\n#### 1200")) == right


def test_a_reference_without_a_number_does_not_fit():
    assert Numeric().fits(Reference("?", "#### 5"))
    assert not Numeric().fits(Reference("?", "a kind of animal"))
