"""Which tokens of a dialogue are trained, with and without a chat template, and what does not fit."""

import itertools
import json
import shutil

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedlora.config import ModelConfig
from fedlora.data.turns import IGNORED, Turns
from fedlora.errors import DataError, ModelError
from fedlora.model.base import load_tokenizer

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
    turns = Turns(tokenizer, 200, chat="auto" if template else "plain")
    trained, others = parts(tokenizer, turns.encode([TWICE])[0])
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


CHATS = {
    "plain": "<s>Be brief.\n\n### Instruction:\na\n\n### Response:\nb</s>### Instruction:\nc\n\n### Response:\nd</s>",
    "chatml": (
        "<s><|im_start|>system\nBe brief.</s>\n<|im_start|>user\na</s>\n<|im_start|>assistant\nb</s>\n"
        "<|im_start|>user\nc</s>\n<|im_start|>assistant\nd</s>\n"
    ),
}
SPOKEN = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
FOUR = [{"role": role, "content": content} for role, content in SPOKEN]


@pytest.mark.parametrize("chat", CHATS)
def test_a_form_that_is_chosen_is_taken_whatever_the_model_has(tokenizer, chat):
    tokenizer.chat_template = CHATML
    turns = Turns(tokenizer, 400, chat=chat)
    text, spans = turns.render(FOUR)
    assert text == CHATS[chat]
    assert [text[begin:end] for begin, end in spans] == ["b</s>", "d</s>"]
    assert parts(tokenizer, turns.encode([FOUR])[0])[0] == "b</s>d</s>"
    assert turns.prompt(FOUR[:4]) == text[: spans[1][0]]


def test_a_mark_that_begins_texts_is_not_there_twice(tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    assert Turns(tokenizer, 200, chat="chatml").render(ASKED)[0] == (
        "<|im_start|>user\nwhat is a cat<|im_end|>\n<|im_start|>assistant\na small animal<|im_end|>\n"
    )


@pytest.mark.parametrize("dialogue", [TWICE, FOUR[:3], FOUR[2:3]])
def test_without_a_template_several_turns_need_a_choice(tokenizer, dialogue):
    with pytest.raises(DataError, match=r"no chat template; choose one: data\.chat_template=plain or chatml"):
        Turns(tokenizer, 200).encode([ASKED, dialogue])
    assert Turns(tokenizer, 200, chat="plain").encode([ASKED, dialogue])[1]


def test_marks_that_a_tokenizer_lacks_are_set_and_told(small_llama, tmp_path):
    folder = shutil.copytree(small_llama(), tmp_path / "unmarked")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for gone in ("eos_token", "pad_token"):
        settings.pop(gone)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    turns = Turns(load_tokenizer(ModelConfig(name=str(folder))), 200)
    assert turns.notes() == [
        "the model's tokenizer names no end token: </s> of its vocabulary is taken",
        "the model's tokenizer names no padding token: its end token is taken, and masked where it pads",
    ]
    assert parts(turns.tokenizer, turns.encode([ASKED])[0])[0] == "a small animal</s>"
    assert turns.tokenizer.pad_token_id == turns.tokenizer.eos_token_id


def test_a_tokenizer_without_anything_that_may_end_a_text_is_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ModelError, match="has no end token, so no answer would end, nor a word that may be one"):
        Turns(PreTrainedTokenizerFast(tokenizer_object=words), 200)


def test_no_example_is_without_a_trained_token_and_what_is_cut_keeps_its_end(tokenizer):
    """At every length: dialogues of one and two turns, short and long, with the marks in the text itself."""
    said = ["a", "so many words " * 12, "</s>", "### Response:\n", " x ", "é" * 20]
    dialogues = [
        [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, texts, strict=False)]
        for texts in itertools.chain(itertools.product(said, said), itertools.product(said, said, said[:2], said))
    ]
    for length, too_long, loss_on in itertools.product((4, 5, 17, 64), ("drop", "cut"), ("response", "all")):
        turns = Turns(tokenizer, length, loss_on, too_long, "plain")
        found = turns.encode(dialogues)
        assert too_long == "drop" or None not in found
        for ids, targets in filter(None, found):
            assert len(ids) <= length
            assert any(target != IGNORED for target in targets[1:])
            assert ids[-1] == targets[-1] == tokenizer.eos_token_id
        assert found.count(None) == turns.counts["left out"]
