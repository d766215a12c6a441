"""Runs that begin alike are scored once before training, and others are not taken for them."""

import json
import shutil

import pytest

from fedlora.config import configfile
from fedlora.files import home
from fedlora.objective.classification import OBJECTIVE
from fedlora.run import before, jobs, rounds
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder

SHORT = {"rounds": 1, "training.local_steps": 1, "training.batch_size": 2}
"""What comes after the scores matters little here."""


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """What a run with FedIT has left for those that begin alike."""
    train(configfile.build({**tiny, **SHORT, "strategy": "fedit"}), tmp_path_factory.mktemp("begun") / "run")
    return (home.cache() / "before").rename(tmp_path_factory.mktemp("kept") / "before")


@pytest.fixture
def scored(tiny, tmp_path, monkeypatch):
    """Train a run of these settings; what it was before training, and how many parts had to be scored for that."""
    evaluate, counted = jobs.evaluate, []

    def counting(bench, folder, number, part):
        counted.extend([part] if number == 0 else [])
        return evaluate(bench, folder, number, part)

    monkeypatch.setattr(jobs, "evaluate", counting)

    def once(**changes):
        counted.clear()
        said, path = [], tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        settings = {name.replace("__", "."): value for name, value in changes.items()}
        train(configfile.build({**tiny, **SHORT, **settings}), path, say=said.append)
        values = rounds.records(RunFolder.open(path))[0].metrics
        assert ("an earlier run that began alike" in " ".join(said)) == (not counted)
        return {name: value for name, value in values.items() if not name.startswith("time/")}, len(counted)

    return once


def test_another_strategy_takes_the_scores_over_bit_by_bit(scored):
    first, parts = scored(strategy="fedit")
    assert parts
    assert first["global/accuracy"] > 0
    for same in (
        {"strategy": "svd"},
        {"strategy": "ffa-lora"},
        {"training__learning_rate": 0.5, "weighting": "uniform"},
    ):
        assert scored(**same) == (first, 0), same


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"lora__rank": 2},
        {"lora__alpha": 3.0},
        {"evaluation__batch_size": 3},
        {"evaluation__local": False},
        {"partition__alpha": 0.9},
        {"data__max_length": 8},
        {"strategy": "fedsa-lora"},
        {"runner__threads": 2},
    ],
    ids=str,
)
def test_what_begins_otherwise_is_scored_itself(begun, scored, other):
    shutil.copytree(begun, home.cache() / "before")
    assert scored(**{"strategy": "fedit", **other})[1]
    assert len(list((home.cache() / "before").iterdir())) == 2


def test_what_begins_alike_is_not(begun, scored):
    shutil.copytree(begun, home.cache() / "before")
    assert scored(strategy="fedit", training__learning_rate=0.3)[1] == 0


@pytest.mark.parametrize("content", ["", "[]", "[1]", '{"a": 1}', "[" * 100])
def test_what_was_kept_and_is_damaged_is_scored_again(scored, content):
    first, parts = scored()
    (kept,) = (home.cache() / "before").iterdir()
    kept.write_text(content)
    assert scored() == (first, parts)
    assert len(json.loads(kept.read_text())) == parts


def test_ranks_that_differ_are_no_secret_of_the_strategy(scored):
    """Clients of lower ranks are sent less than the state holds: then the strategy is part of the beginning."""
    ranks = {"lora__ranks": [2, 4, 4]}
    first, parts = scored(strategy="zero-padding", **ranks)
    assert scored(strategy="flexlora", **ranks)[1] == parts
    assert scored(strategy="zero-padding", weighting="uniform", **ranks) == (first, 0)


def test_where_a_plug_in_judges_nothing_is_kept(scored, monkeypatch):
    """Its code may be another the next time."""
    first, parts = scored()
    monkeypatch.setattr(type(OBJECTIVE), "__module__", "somebody.judges")
    assert scored() == (first, parts)
    assert len(list((home.cache() / "before").iterdir())) == 1


def test_who_works_on_our_code_does_not_meet_scores_of_before(scored, monkeypatch):
    first, parts = scored()
    monkeypatch.setattr(before, "_changed", lambda: 1)
    assert scored() == (first, parts)
