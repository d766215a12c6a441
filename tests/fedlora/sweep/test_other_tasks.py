"""Runs of a task that is judged by another score than accuracy: their own table, and why they are not swept yet."""

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


def test_a_sweep_of_it_is_refused_with_the_reason(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nbase: demo\nset: {task: generation}\ngrid: {strategy: [fedit, svd]}\n")
    with pytest.raises(ConfigError, match="task=generation is judged by its loss, and sweeps compare accur"):
        plan.load(str(file), {}, PRESETS, tmp_path)
