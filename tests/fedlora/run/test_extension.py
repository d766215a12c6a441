"""A finished run that goes on to more rounds is what a run of so many would have been."""

import pytest

from fedlora import metrics
from fedlora.adapter import Adapter
from fedlora.errors import ConfigError, RunFolderError
from fedlora.run import extension, rounds
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder

LONG = 4


def numbers(run):
    """All that a run has measured but its times."""
    return [(record.round, record.clients, metrics.reproducible(record.metrics)) for record in rounds.records(run)]


def weights(run):
    state = run.read_state(LONG)
    return {name: tensor.tolist() for name, tensor in Adapter.tensors(state.adapter).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "flora-na", "keep_rounds": 1},
        {"strategy": "fedex-lora", "evaluation.every": 3},  # round 2 was scored because it was the last
        {"strategy": "rolora", "fraction": 0.67},
        {"strategy": "replication", "lora.ranks": [2, 4, 8]},
    ],
    ids=lambda changes: changes["strategy"],
)
def test_it_is_bit_for_bit_what_it_would_have_been(configure, tmp_path, changes):
    train(configure(changes), tmp_path / "short")
    train(configure({**changes, "rounds": LONG}), tmp_path / "long")
    short = RunFolder.open(tmp_path / "short")
    config = extension.extended(short, {"rounds": LONG})
    train(config, extension.extend(short, config, tmp_path / "on").path)
    on, whole = RunFolder.open(tmp_path / "on"), RunFolder.open(tmp_path / "long")
    assert config.digest() == whole.config.digest()
    assert numbers(on) == numbers(whole)
    assert weights(on) == weights(whole)
    assert on.extends == short.id != on.id
    assert len(numbers(short)) == 3  # which stays as it is


def test_a_round_that_counts_alike_is_not_scored_again(configure, finished, tmp_path):
    short = RunFolder.open(finished({"strategy": "flora-na"}))
    folder = extension.extend(short, extension.extended(short, {"rounds": 3}), tmp_path / "on")
    assert folder.finished_rounds() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": 2}, r"rounds=2, and the run in .* has 2; set rounds to more"),
        ({"rounds": 4, "training.learning_rate": 0.1}, r"training.learning_rate=0.1 would make another run"),
        ({}, "rounds=2, and the run"),
    ],
)
def test_what_would_be_another_run_is_refused(finished, changes, words):
    with pytest.raises(ConfigError, match=words):
        extension.extended(RunFolder.open(finished()), changes)


def test_a_learning_rate_that_falls_over_the_rounds_goes_nowhere(finished):
    run = RunFolder.open(finished({"training.final_learning_rate": 1e-4}))
    with pytest.raises(ConfigError, match=r"final_learning_rate=0.0001: the learning rate of every round depends"):
        extension.extended(run, {"rounds": 4})


def test_what_changes_no_numbers_may_change(finished):
    config = extension.extended(RunFolder.open(finished()), {"rounds": 5, "keep_rounds": 1, "runner.slots": 1})
    assert (config.rounds, config.keep_rounds, config.runner.slots) == (5, 1, 1)


def test_a_run_that_is_not_finished_is_refused(finished, tmp_path, as_new):
    run = as_new(finished(), tmp_path / "run")
    (run.path / run.record_name(2)).unlink()
    with pytest.raises(RunFolderError, match=r"is not finished \(2 rounds of 3.*fedlora resume"):
        extension.extended(run, {"rounds": 4})


def test_a_run_whose_last_state_is_gone_is_refused(finished, tmp_path, as_new):
    run = as_new(finished(), tmp_path / "run")
    (run.path / f"{run.state_stem(2)}.safetensors").write_bytes(b"")
    with pytest.raises(RunFolderError, match="the state after round 2 is missing or damaged"):
        extension.extended(run, {"rounds": 4})


def test_a_folder_in_use_is_left_alone(finished, tmp_path, as_new):
    run = as_new(finished(), tmp_path / "run")
    with pytest.raises(RunFolderError, match="holds a run"):
        extension.extend(run, extension.extended(run, {"rounds": 3}), run.path)
