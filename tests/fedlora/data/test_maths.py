"""Sums made by reasoning-gym: written once, the same from the same seed, with answers that are numbers."""

import json
import sys
from importlib.util import find_spec

import pytest

from fedlora.config import DataConfig
from fedlora.data import dialogues, maths
from fedlora.errors import ConfigError

NEEDED = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="the extra 'maths' is not installed")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@NEEDED
def test_the_same_seed_is_the_same_file_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert maths.make(["gsm_symbolic"], 20, seed, None, tmp_path / f"{name}.jsonl") == 20
    one, same, other = (rows(tmp_path / f"{name}.jsonl") for name in "abc")
    assert one == same
    assert not {row["question"] for row in one} & {row["question"] for row in other}
    assert all(row["solution"].endswith(f"#### {row['answer']}") for row in one)


@NEEDED
def test_levels_are_harder_and_questions_are_asked_once(tmp_path):
    easy, hard = (tmp_path / f"{level}.jsonl" for level in (0, 6))
    assert maths.make(["chain_sum"], 300, 0, 0, easy) < 300
    assert maths.make(["chain_sum", "chain_sum", "gcd"], 30, 0, 6, hard) == 60
    assert len({row["question"] for row in rows(easy)}) == len(rows(easy))
    longest = [max(len(row["answer"]) for row in rows(path) if row["task"] == "chain_sum") for path in (easy, hard)]
    assert longest[0] <= 3 < longest[1]


@NEEDED
def test_tasks_are_natural_clients_of_instruction_data(tmp_path):
    maths.make(["gcd", "lcm"], 20, 0, None, tmp_path / "sums.jsonl")
    read = dialogues.read(DataConfig(name=str(tmp_path / "sums.jsonl"), client="task"), None, 0)
    assert set(read.train["client"].to_pylist()) == {"gcd", "lcm"}
    asked, answered = read.test["messages"][0].as_py()
    assert "of these numbers" in asked["content"]
    assert answered["content"].isdecimal()


REFUSED = {
    "an unknown task": (["chain_sums"], None, "sums.jsonl", "no such task. Did you mean 'chain_sum'"),
    "answers that are no numbers": (["countdown"], None, "sums.jsonl", r"its answers are no numbers \('"),
    "a task without levels": (["gsm_symbolic"], 2, "sums.jsonl", "gsm_symbolic has no levels; leave it out"),
    "a file that is there": (["gcd"], None, "there.jsonl", "there.jsonl is there already"),
    "another kind of file": (["gcd"], None, "sums.csv", r"sums.csv should end in .jsonl"),
}


@NEEDED
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_made_is_one_line_and_no_file(tmp_path, case):
    tasks, level, name, said = REFUSED[case]
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=said) as refused:
        maths.make(tasks, 5, 0, level, tmp_path / name)
    assert "\n" not in str(refused.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_without_the_package_it_is_said_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedlora\[maths\]'"):
        maths.make(["gcd"], 5, 0, None, tmp_path / "sums.jsonl")
