"""Test examples as questions."""

import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from fedlora.data import questions
from fedlora.data.turns import Turns


def said(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def table(dialogues, **columns):
    return pa.table({"messages": dialogues, **columns})


@pytest.fixture(scope="module")
def tokenizer(small_llama):
    return AutoTokenizer.from_pretrained(small_llama())


def test_what_is_asked_ends_where_the_answer_begins(tokenizer):
    turns = Turns(tokenizer, 200, chat="plain")
    dialogue = said("what is a dog?", "an animal", "and a rose?", "a plant")
    split = pa.table(questions.columns(table([dialogue]), turns, []))
    found = questions.questions(split, [0])
    text = tokenizer.decode(found.asked[0])
    assert text.endswith("and a rose?\n\n### Response:\n")
    assert "an animal" in text
    assert "a plant" not in text
    assert found.references == [questions.Reference("and a rose?", "a plant")]
    whole, _ = turns.encode([dialogue])[0]
    assert whole[: len(found.asked[0])] == found.asked[0].tolist()  # as in training


def test_a_long_prompt_is_cut_at_its_beginning(tokenizer):
    split = pa.table(questions.columns(table([said("dog " * 50 + "cat", "yes")]), Turns(tokenizer, 20), []))
    asked = questions.questions(split, [0]).asked[0]
    assert len(asked) == 20
    assert tokenizer.decode(asked).endswith("cat\n\n### Response:\n")


def test_few_different_responses_are_options():
    few = table([said("?", answer) for answer in ("no", "yes", "no")])
    assert questions.options_of(few) == ["no", "yes"]
    many = table([said("?", str(number)) for number in range(questions.MOST_OPTIONS + 1)])
    assert questions.options_of(many) == []


def test_what_a_set_brings_along_comes_before_what_is_made_up():
    split = table([said("?", "b"), said("?", "no")], options=[["a", "b"], []], tests=[["assert f()"], None])
    first, second = questions.references(split, ["no", "yes"])
    assert (first.options, first.tests) == (("a", "b"), ("assert f()",))
    assert (second.options, second.tests) == (("no", "yes"), ())


def test_rows_are_taken_in_their_order(tokenizer):
    dialogues = [said(f"number {i}?", str(i)) for i in range(5)]
    split = pa.table(questions.columns(table(dialogues), Turns(tokenizer, 40), []))
    found = questions.questions(split, [4, 1])
    assert [each.answer for each in found.references] == ["4", "1"]
    assert found.rows == [4, 1]
    assert [each.answer for each in questions.questions(split, [1]).references] == ["1"]
