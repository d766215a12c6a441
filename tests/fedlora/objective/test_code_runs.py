"""A run whose answers are programs that are run: refused until allowed, and then said."""

import json

import pytest

from fedlora import objective
from fedlora.config import configfile
from fedlora.errors import ConfigError
from fedlora.run import preflight, rounds
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    file = tmp_path_factory.mktemp("code") / "problems.jsonl"
    rows = [
        {"prompt": f"Return {i}.", "response": f"def f():\n    return {i}", "test_list": [f"assert f() == {i}"]}
        for i in range(40)
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


@pytest.fixture
def config(writing, problems):
    changes = {"data.name": str(problems), "partition.by": None, "partition.name": "iid", "rounds": 1}
    changes |= {"evaluation.generate.scorers": ["code"], "evaluation.generate.examples": 3}
    return lambda allowed: configfile.build(
        {**writing, **changes, "evaluation.generate.max_new_tokens": 6, "evaluation.execute_code": allowed}
    )


def test_it_is_refused_until_allowed(config):
    with pytest.raises(ConfigError, match=r"scorers=code runs Python that the model has written; set evaluation\.exec"):
        preflight.names(config(False))
    preflight.names(config(True))


def test_it_is_said_when_the_run_begins_and_judged_by_the_tests(config, tmp_path):
    (notice,) = RunFolder.create(tmp_path / "run", config(True)).objective.notices(config(True))
    assert "Python that the model writes is run" in notice
    assert "rights" in notice
    train(config(True), tmp_path / "run")
    last = rounds.records(RunFolder(tmp_path / "run"))[-1].metrics
    assert last["global/code"] == 0  # an untrained model writes no program
    assert last["global/answers"] == 3


def test_others_say_nothing(writing):
    config = configfile.build(writing)
    assert objective.find(config.task).notices(config) == ()
