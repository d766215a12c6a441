"""Dialogues in every form that sets come in, and what is refused."""

import json

import pandas as pd
import pytest

from fedlora.config import DataConfig
from fedlora.data import catalogue, dialogues, sources
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
    "instruction with context": (lambda n: {"instruction": f"a {n}", "context": "", "response": f"b {n}"}, {}),
    "nested columns": (
        lambda n: {"task": {"ask": f"a {n}", "more": 1}, "said": [{"text": f"b {n}"}, {"text": "c"}]},
        {"prompt": "task.ask", "response": "said.0.text"},
    ),
    "a template": (
        lambda n: {"n": n, "word": "a", "answer": f"b {n}", "none": None},
        {"template": "{{ word }}{{ none }} {{ row['n'] }}"},
    ),
    "a template with a named response": (
        lambda n: {"task": {"words": ["a", str(n)]}, "said": f"b {n}"},
        {"template": "{{ task.words | join(' ') }}", "response": "said"},
    ),
    "ShareGPT": (
        lambda n: {"conversations": [{"from": "human", "value": f"a {n}"}, {"from": "gpt", "value": f"b {n}"}]},
        {},
    ),
    "chats elsewhere": (
        lambda n: {
            "log": {"chat": [{"role": "user", "content": f"a {n}"}, {"role": "assistant", "content": f"b {n}"}]}
        },
        {"messages": "log.chat"},
    ),
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


def test_lines_end_in_one_way(tmp_path):
    rows = [{"prompt": "a", "response": "def f():\r\n    pass"}] * 5
    assert said(load(written(tmp_path, rows)))[0][1] == ("assistant", "def f():\n    pass")


def test_nested_groups_and_owners(tmp_path):
    rows = [{"prompt": "a", "response": "b", "about": {"topic": "xyz"[n % 3], "who": [f"w{n % 2}"]}} for n in range(30)]
    text = load(written(tmp_path, rows), by="about.topic", client="about.who.0")
    assert text.labels == ("x", "y", "z")
    assert set(text.tables["test"]["client"].to_pylist()) == {"w0", "w1"}


MBPP = {"prompt": "a", "response": "b", "test_list": ["assert f(1)", "assert f(2)"], "test_setup_code": "import os"}
WITH_TESTS = {
    "as MBPP has them": (MBPP, {}, ["import os", "assert f(1)", "assert f(2)"]),
    "without anything before": (MBPP | {"test_setup_code": ""}, {}, ["assert f(1)", "assert f(2)"]),
    "as HumanEval has them": (
        {"prompt": "a", "response": "b", "test": "def check(candidate): ...", "entry_point": "f"}, {},
        ["def check(candidate): ...", "check(f)"],
    ),
    "of a column": ({"prompt": "a", "response": "b", "c": {"t": "assert g()"}}, {"tests": "c.t"}, ["assert g()"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WITH_TESTS)
def test_what_an_answer_is_judged_by_is_kept(tmp_path, case):
    row, options, tests = WITH_TESTS[case]
    text = load(written(tmp_path, [row] * 5), **options)
    assert text.tables["train"]["tests"].to_pylist() == [tests] * 4
    assert text.tables["test"]["tests"].to_pylist() == [tests]


def test_options_to_choose_among_are_kept(tmp_path):
    rows = [{"prompt": "a", "response": "b", "choices": {"text": ["b", "c"]}}] * 5
    assert load(written(tmp_path, rows), options="choices.text").tables["test"]["options"].to_pylist() == [["b", "c"]]


def test_rows_that_say_nothing_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": "a", "response": " " if n % 5 == 0 else f"b {n}", "who": str(n)} for n in range(40)]
    text = load(written(tmp_path, rows), empty="drop", client="who")
    kept = [row for split in ("train", "test") for row in text.tables[split].to_pylist()]
    assert sorted(row["client"] for row in kept) == sorted(str(n) for n in range(40) if n % 5)
    assert all(row["messages"][1]["content"] == f"b {row['client']}" for row in kept)
    gone = [int(note.split(": ")[1].split()[0]) for note in text.notes if "(data.empty=drop)" in note]
    assert sum(gone) == 8


def test_only_rows_that_are_drawn_are_looked_at(tmp_path):
    rows = [{"prompt": "a", "response": "" if n == 17 else "b"} for n in range(40)]
    path = written(tmp_path, rows)
    assert len(load(path, train_size=2, test_size=8).tables["train"]) == 2
    with pytest.raises(DataError, match=r"row 18 has an empty response; fill it in.* set data\.empty"):
        load(path)


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
    "an unknown role": ([{"messages": [{"role": "bot", "content": "x"}]}] * 5, {}, "has a message of role 'bot'"),
    "nobody answers": ([{"messages": [{"role": "user", "content": "x"}]}] * 5, {}, "no message of role assistant"),
    "messages that are text": ([{"messages": "hello"}] * 5, {}, r"row \d holds str for messages, expected a list"),
    "a response that is no text": (
        [{"prompt": "a", "response": {"text": "b"}}] * 5,
        {},
        "has a dict for what the assistant says, expected text; na",
    ),
    "a missing nested column": (
        [{"task": {"ask": "a"}, "said": "b"}] * 5,
        {"prompt": "task.asked", "response": "said"},
        "no column 'task.asked' for data.prompt; its columns are: task.ask, said",
    ),
    "a template that cannot be read": (GOOD, {"template": "{{ prompt"}, "data.template cannot be read: unexpected end"),
    "a template of no column": (
        GOOD,
        {"template": "{{ promt }}"},
        "data.template names 'promt', which is no column of .* Did you mean 'prompt'. Its columns are: prompt, r",
    ),
    "a template of nothing inside": (
        [{"a": {"b": 1}, "response": "c"}] * 5,
        {"template": "{{ a.c }}"},
        "row .: data.template cannot be written: .*'c'",
    ),
    "a template that reaches out": (
        GOOD,
        {"template": "{{ prompt.__class__.__mro__ }}"},
        "cannot be written: access to attribute '__class__'",
    ),
    "a template without a response": (
        [{"a": "b"}] * 5,
        {"template": "{{ a }}"},
        "data.response is to name the column of .*; its columns are: a",
    ),
    "no such tests": (GOOD, {"tests": "checks"}, "no column 'checks' for data.tests"),
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


SETS = {
    "gsm8k": ({"question": "1 + {n}?", "answer": "#### {n}"}, "1 + 0?", "#### 0", None),
    "mbpp": (
        {"text": "Add {n}.", "code": "def f{n}(): ...", "test_list": ["assert f{n}()"], "test_setup_code": ""},
        "Add 0.\n\nYour code should pass these tests:\n\nassert f0()", "def f0(): ...", None,
    ),
    "alpaca-gpt4": ({"instruction": "Do {n}.", "input": "", "output": "Done {n}"}, "Do 0.", "Done 0", None),
    "dolly-15k": (
        {"instruction": "Do {n}.", "context": "Of {n}.", "response": "Done {n}", "category": "qa"},
        "Do 0.\n\nOf 0.", "Done 0", "qa",
    ),
    "natural-instructions": (
        {"task_name": "t{n}", "id": "{n}", "definition": "Add.", "inputs": "{n} + 1", "targets": "{n}"},
        "Add.\n\n0 + 1", "0", "t0",
    ),
}  # fmt: skip


def filled(value, n):
    return [filled(each, n) for each in value] if isinstance(value, list) else value.replace("{n}", str(n))


@pytest.mark.parametrize("origin", ["folder", "hub"])
@pytest.mark.parametrize("name", SETS)
def test_sets_with_a_name_are_read_from_a_folder_and_from_the_hub(tmp_path, monkeypatch, name, origin):
    import datasets

    row, asked, answered, owner = SETS[name]
    rows = [{column: filled(value, n) for column, value in row.items()} for n in range(10)]
    monkeypatch.setenv("FEDLORA_DATA_DIR", str(tmp_path))
    if origin == "folder":
        (tmp_path / name).mkdir()
        written(tmp_path / name, rows[:8], "train.jsonl"), written(tmp_path / name, rows[8:], "test.jsonl")
    else:
        parts = {"train": datasets.Dataset.from_list(rows[:8]), "test": datasets.Dataset.from_list(rows[8:])}
        monkeypatch.setattr(datasets, "load_dataset", lambda *args: datasets.DatasetDict(parts))
    config = DataConfig(name=name)
    text = sources.finish(dialogues.read(config, None, seed=0))
    assert text.origin == origin
    assert [("user", asked), ("assistant", answered)] in said(text)
    assert {"tests", "client"} & set(text.tables["test"].column_names) == (
        ({"tests"} if name == "mbpp" else set()) | ({"client"} if owner else set())
    )
    if owner:
        assert owner in text.tables["train"]["client"].to_pylist()
        catalogue.check_owners(config, "natural-id")


def test_a_local_copy_without_owners_is_read_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_DATA_DIR", str(tmp_path))
    (tmp_path / "dolly-15k").mkdir()
    for split in ("train", "test"):
        written(tmp_path / "dolly-15k", [{"instruction": "a", "response": "b"}] * 3, f"{split}.jsonl")
    assert "client" not in load("dolly-15k").tables["train"].column_names
