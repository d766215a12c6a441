"""Runs of a task that is judged by another score than accuracy: their own table, and what is swept together."""

import pytest

from deployments.shipped import PRESETS
from fedlora.config import configfile
from fedlora.errors import ConfigError
from fedlora.run.loop import train
from fedlora.sweep import comparison, plan
from fedlora.sweep.comparison import Result


def test_the_table_of_a_run_shows_the_scores_of_its_task(writing, shared):
    config = configfile.build({**writing, "strategy": "flora-na"})
    folder = shared("writing-flora-na", lambda path: train(config, path))
    results = [Result.of_folder({"strategy": "flora-na"}, folder)]
    shown = comparison.columns(results)
    assert shown[:3] == ("loss", "token accuracy", "gap")
    means, _ = comparison.over_seeds(comparison.frame(results), ["strategy"], shown)
    assert means["loss"].iloc[0] == results[0].records[-1].metrics["global/loss"]
    assert means["gap"].notna().all()


@pytest.fixture
def load(tmp_path):
    """`load(text)`: the plan of a sweep in a file."""

    def loaded(text):
        file = tmp_path / "mine.yaml"
        file.write_text(f"name: mine\nbase: demo\n{text}")
        return plan.load(str(file), {}, PRESETS, tmp_path)

    return loaded


def test_a_sweep_of_another_task_is_planned(load):
    found = load("set: {task: generation}\ngrid: {strategy: [fedit, svd]}\n")
    assert {cell.config.task for cell in found.cells} == {"generation"}


def test_tasks_are_not_mixed_in_a_sweep(load):
    with pytest.raises(ConfigError, match="runs of task=classification and task=generation in one sweep, which no"):
        load("grid: {task: [classification, generation]}\n")


def test_nor_scores_of_one_task(load):
    with pytest.raises(ConfigError, match=r"some runs are judged by exact match and others by loss; make a sweep of"):
        load("set: {task: generation}\ngrid: {evaluation.generate.scorers: [[], [exact]]}\n")
