"""Dialogues in every form that sets come in, and what is refused."""

import json

import pandas as pd
import pytest

from fedlora.config import DataConfig
from fedlora.data import dialogues, sources
from fedlora.errors import DataError


def written(tmp_path, rows, name="set.jsonl"):
    path = tmp_path / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def load(path, by=None, **options):
    return sources.finish(dialogues.read(DataConfig(name=path, test_fraction=0.2, **options), by, seed=0))


def said(text):
    """Every dialogue of both splits, as pairs of role and content."""
    rows = [row for split in ("train", "test") for row in text.tables[split]["messages"].to_pylist()]
    return sorted([(each["role"], each["content"]) for each in row] for row in rows)


ONE = [("user", "a {n}"), ("assistant", "b {n}")]
FORMS = {
    "prompt and response": (lambda n: {"prompt": f"a {n}", "response": f"b {n}"}, {}),
    "question and answer": (lambda n: {"question": f"a {n}", "answer": f"b {n}"}, {}),
    "named columns": (lambda n: {"x": f"a {n}", "y": f"b {n}"}, {"prompt": "x", "response": "y"}),
    "Alpaca without input": (lambda n: {"instruction": f"a {n}", "input": "", "output": f"b {n}"}, {}),
    "messages": (
        lambda n: {"messages": [{"role": "user", "content": f"a {n}"}, {"role": "assistant", "content": f"b {n}"}]},
        {},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_dialogues(tmp_path, form):
    row, options = FORMS[form]
    text = load(written(tmp_path, [row(n) for n in range(10)]), **options)
    assert said(text) == sorted([(role, content.format(n=n)) for role, content in ONE] for n in range(10))
    assert (len(text.tables["train"]), len(text.tables["test"])) == (8, 2)


def test_the_input_of_an_instruction_follows_it(tmp_path):
    rows = [{"instruction": "Add.", "input": f"{n} and {n}", "output": str(2 * n)} for n in range(10)]
    assert [("user", "Add.\n\n3 and 3"), ("assistant", "6")] in said(load(written(tmp_path, rows)))


def test_a_parquet_file_of_chats(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pd.DataFrame({"messages": [chat] * 10}).to_parquet(tmp_path / "set.parquet")
    assert said(load(str(tmp_path / "set.parquet")))[0] == [("system", "s"), ("user", "a"), ("assistant", "b")]


def test_groups_and_owners_are_columns(tmp_path):
    rows = [{"prompt": "a", "response": "b", "topic": "xyz"[n % 3], "who": f"w{n % 2}"} for n in range(30)]
    text = load(written(tmp_path, rows), by="topic", client="who")
    assert text.labels == ("x", "y", "z")
    assert text.tables["train"]["label"].to_pylist().count(2) == 8
    assert set(text.tables["test"]["client"].to_pylist()) == {"w0", "w1"}
    assert load(written(tmp_path, rows)).labels == ("all",)


GOOD = [{"prompt": "a", "response": "b"}] * 5
BAD = {
    "an empty response": ([*GOOD, {"prompt": "a", "response": " "}], {}, "row 6 has an empty response"),
    "no response": ([*GOOD, {"prompt": "a", "response": None}], {}, "row 6 has an empty response"),
    "an unknown role": ([{"messages": [{"role": "bot", "content": "x"}]}], {}, "row 1 has a message of role 'bot'"),
    "nobody answers": ([{"messages": [{"role": "user", "content": "x"}]}], {}, "no message of role assistant"),
    "messages that are text": ([{"messages": "hello"}], {}, "row 1 holds str for messages, expected a list"),
    "no dialogues": ([{"text": "a", "label": "b"}], {}, "has no columns that hold dialogues; its columns are: text, l"),
    "a missing column": (GOOD, {"prompt": "ask", "response": "response"}, "no column 'ask' for data.prompt; its colum"),
    "a missing owner": (GOOD, {"client": "who"}, "no column 'who' for data.client"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_dialogue_is_one_line(tmp_path, case):
    rows, options, said = BAD[case]
    with pytest.raises(DataError, match=said) as refused:
        load(written(tmp_path, rows), **options)
    assert "\n" not in str(refused.value)


def test_a_group_without_training_examples(tmp_path):
    for name, topics in (("train", "xx"), ("test", "xy")):
        rows = [{"prompt": "a", "response": "b", "topic": topic} for topic in topics]
        written(tmp_path, rows, f"{name}.jsonl")
    with pytest.raises(DataError, match="examples of y in column 'topic', of which no training example is"):
        load(str(tmp_path), by="topic")
