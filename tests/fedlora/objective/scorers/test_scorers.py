"""What scorers make of an answer, which there are, and references that do not fit."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from fedlora.data.questions import Questions, Reference
from fedlora.errors import ConfigError, DataError
from fedlora.objective import scorers
from fedlora.objective.scorers import Scorer
from fedlora.objective.scorers.judging import Judged, judged


@pytest.mark.parametrize(
    ("answer", "right"),
    [("A kind of  Animal.", 1), ("“a kind of animal”", 0), ("a kind of\nanimal!", 1), ("animal", 0), ("", 0)],
)
def test_exact_overlooks_case_spaces_and_punctuation_at_the_ends(answer, right):
    assert scorers.find("exact").judge(answer, Reference("?", "a kind of animal")) == right


def test_rouge_l_leaves_the_log_of_others_alone():
    """Its library prints all of it on the terminal, once it has said which tokenizer it takes."""
    made = (
        "import logging; from fedlora.objective import scorers; scorers.find('rouge-l'); print(logging.root.handlers)"
    )
    found = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_rouge_l_is_the_longest_common_subsequence():
    found = scorers.find("rouge-l").judge("the cat sat there", Reference("?", "the cats sat"))
    assert found == pytest.approx(2 * 3 / (4 + 3))  # three words in common, with stems


def test_a_choice_needs_options_with_the_response_among_them():
    choice = scorers.find("choice")
    assert choice.fits(Reference("?", "yes", options=("yes", "no")))
    assert not choice.fits(Reference("?", "yes", options=("no", "maybe")))
    assert not choice.fits(Reference("?", "yes", options=("yes",)))
    assert choice.judge("yes", Reference("?", "yes")) == 1
    assert choice.judge("no", Reference("?", "yes")) == 0


def test_all_are_found_by_their_names():
    assert [scorers.find(name).name for name in scorers.names()] == scorers.names()
    assert set(scorers.names()) >= {"exact", "numeric", "choice", "choice-normalised", "rouge-l", "code"}


def test_an_unknown_one_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"scorers=exat: no such scorer\. Did you mean 'exact'.*numeric"):
        scorers.find("exat")


class Shouting(Scorer):
    name = "shouting"
    title = "shouting"
    expects = "nothing"

    def judge(self, answer, reference):
        return float(answer.isupper())


@pytest.fixture
def plugins(monkeypatch):
    def install(value, name="shouting"):
        point = EntryPoint(name, value, scorers.GROUP)
        monkeypatch.setattr(scorers, "entry_points", lambda group: [point])
        scorers._locations.cache_clear()

    yield install
    scorers._locations.cache_clear()


def test_a_plug_in_is_found(plugins):
    plugins(f"{__name__}:Shouting")
    assert scorers.names()[-1] == "shouting"
    assert scorers.find("shouting").judge("YES", Reference("?", "no")) == 1


@pytest.mark.parametrize("value", ["nowhere:Thing", f"{__name__}:Reference", f"{__name__}:absent"])
def test_a_plug_in_that_is_none_is_refused(plugins, value):
    plugins(value)
    with pytest.raises(ConfigError, match="scorers=shouting comes from a plug-in"):
        scorers.find("shouting")


def test_references_that_do_not_fit_are_counted_and_shown():
    known = [Reference("?", "#### 5"), Reference("?", "a kind of animal"), Reference("?", "none")]
    with pytest.raises(DataError, match=r"scorers=numeric expects a number .* 2 of 3 test examples .*a kind of animal"):
        scorers.check(scorers.find("numeric"), known)
    scorers.check(scorers.find("exact"), known)


def test_judgements_of_parts_add_up_and_are_read_again():
    asked = Questions([None] * 3, [Reference(f"q{i}", f"a{i}") for i in range(3)], [7, 3, 5])
    exact, numeric = scorers.find("exact"), scorers.find("numeric")
    answers = ["a0", "a1", "wrong"]
    whole = judged({exact: answers, numeric: answers}, asked, show=[3, 5])
    one, two = (
        judged(
            dict.fromkeys((exact, numeric), answers[part]),
            Questions(asked.asked[part], asked.references[part], asked.rows[part]),
            show=[3, 5],
        )
        for part in (slice(0, 1), slice(1, 3))
    )
    assert one + two == whole == Judged.from_json(whole.to_json())
    assert whole.values() == {"exact": 2 / 3, "numeric": 2 / 3, "answers": 3}
    assert whole.shown == (
        {"row": 3, "prompt": "q1", "answer": "a1", "reference": "a1", "exact": 1.0, "numeric": 1.0},
        {"row": 5, "prompt": "q2", "answer": "wrong", "reference": "a2", "exact": 0.0, "numeric": 0.0},
    )


@pytest.mark.parametrize(
    "damage", [{"count": -1}, {"sums": {"exact": 9.0}}, {"sums": {"exact": float("nan")}}, {"count": 2.5}]
)
def test_judgements_that_cannot_be_are_refused(damage):
    with pytest.raises(ValueError, match=r"worth|judgements"):
        Judged.from_json({"sums": {"exact": 1.0}, "count": 2, "shown": []} | damage)
