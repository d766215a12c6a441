"""Which tokens of a dialogue are trained, with and without a chat template, and what does not fit."""

import pytest
from transformers import AutoTokenizer

from fedlora.data.turns import IGNORED, Turns
from fedlora.errors import DataError, ModelError

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
FORGETFUL = "{{ messages[-1]['content'] }}"
ASKED = [{"role": "user", "content": "what is a cat"}, {"role": "assistant", "content": "a small animal"}]
TWICE = [*ASKED, {"role": "user", "content": "and an oak"}, {"role": "assistant", "content": "a large plant"}]


@pytest.fixture
def tokenizer(small_llama):
    return AutoTokenizer.from_pretrained(small_llama())


def parts(tokenizer, found):
    """What is trained and what is not, as text."""
    ids, targets = found
    trained = [token for token, target in zip(ids, targets, strict=True) if target != IGNORED]
    assert all(target in (token, IGNORED) for token, target in zip(ids, targets, strict=True))
    others = [token for token, target in zip(ids, targets, strict=True) if target == IGNORED]
    return tokenizer.decode(trained), tokenizer.decode(others)


@pytest.mark.parametrize("template", [None, CHATML])
def test_only_what_the_assistant_says_is_trained_with_its_end(tokenizer, template):
    tokenizer.chat_template = template
    (found,) = Turns(tokenizer, 200).encode([ASKED])
    trained, others = parts(tokenizer, found)
    assert trained.strip() == "a small animal</s>"
    assert "what is a cat" in others
    assert "animal" not in others


@pytest.mark.parametrize("template", [None, CHATML])
def test_of_several_turns_every_one_is_trained(tokenizer, template):
    tokenizer.chat_template = template
    trained, others = parts(tokenizer, Turns(tokenizer, 200).encode([TWICE])[0])
    assert trained.replace("\n", "") == "a small animal</s>a large plant</s>"
    assert "and an oak" in others


def test_all_is_all(tokenizer):
    ids, targets = Turns(tokenizer, 200, loss_on="all").encode([ASKED])[0]
    assert ids == targets


def test_a_prompt_ends_where_the_answer_begins(tokenizer):
    for template in (None, CHATML):
        tokenizer.chat_template = template
        turns = Turns(tokenizer, 200)
        text, [(begin, _)] = turns.render(ASKED)
        assert turns.prompt(ASKED[:1]) == text[:begin]


def test_a_template_that_forgets_is_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(DataError, match="writes earlier turns anew"):
        Turns(tokenizer, 200).encode([TWICE])


def test_a_template_that_fails_is_one_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('Only\nuser roles') }}"
    with pytest.raises(DataError, match="does not take a dialogue of the data: Only user roles"):
        Turns(tokenizer, 200).encode([ASKED])


LONG = [{"role": "user", "content": "so many words " * 30}, ASKED[1]]
VERBOSE = [ASKED[0], {"role": "assistant", "content": "so many words " * 30}]


def test_a_long_prompt_loses_its_beginning_and_the_response_stays_whole(tokenizer):
    turns = Turns(tokenizer, 40)
    ids, targets = turns.encode([LONG])[0]
    assert len(ids) == 40
    assert parts(tokenizer, (ids, targets))[0] == "a small animal</s>"
    assert turns.notes() == ["1 example longer than data.max_length: the prompt is cut at its beginning (40)"]


def test_a_response_that_does_not_fit_is_left_out_or_cut_with_its_end_kept(tokenizer):
    turns = Turns(tokenizer, 40)
    assert turns.encode([VERBOSE, ASKED])[0] is None
    assert turns.notes()[0].startswith("1 example of which no response fits in data.max_length left out")
    cut = Turns(tokenizer, 40, too_long="cut")
    ids, targets = cut.encode([VERBOSE])[0]
    assert len(ids) == 40
    assert ids[-1] == targets[-1] == tokenizer.eos_token_id
    assert sum(target != IGNORED for target in targets) == 30  # a quarter is the prompt's
    assert "cut, with the end mark kept" in cut.notes()[0]


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no end token"):
        Turns(tokenizer, 200)
