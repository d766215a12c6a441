"""What every objective keeps to, and that one is found by the name of its file."""

import re

import pytest

from fedlora import objective
from fedlora.config import RunConfig, configfile
from fedlora.errors import ConfigError
from fedlora.run import preflight

MINE = """
from fedlora.objective.classification import Classification

class Counting(Classification):
    name = "counting"

OBJECTIVE = Counting()
"""


@pytest.mark.parametrize("task", objective.names())
def test_the_score_that_decides_is_one_of_its_scores(task):
    found = objective.find(task)
    assert found.name == task
    decides, *others = found.scores_of(RunConfig(task=task))
    assert decides == found.score_of(RunConfig(task=task)) == objective.score_of(RunConfig(task=task))
    assert all(score.low < score.high for score in (decides, *others))
    assert decides.name not in {score.name for score in others}
    assert issubclass(found.scores, objective.Scores)


def test_a_file_is_all_that_another_needs(tmp_path, monkeypatch):
    (tmp_path / "counting.py").write_text(MINE)
    monkeypatch.setattr(objective, "__path__", [*objective.__path__, str(tmp_path)])
    assert "counting" in objective.names()
    assert objective.find("counting").name == "counting"


def test_a_name_that_there_is_not_is_refused_before_anything_starts():
    config = configfile.build({"task": "classifcation"})
    with pytest.raises(ConfigError, match=re.escape("task=classifcation: no such objective. Did you mean 'classific")):
        preflight.names(config)


def test_runs_from_before_there_was_a_choice_are_found_again():
    """The digest of a configuration as it was written then (`fedlora run demo`)."""
    from deployments.shipped import PRESETS

    assert configfile.load("demo", {"task": "classification"}, PRESETS).digest() == "895d51fddc64710a"
    assert configfile.load("demo", {"task": "regression"}, PRESETS).digest() != "895d51fddc64710a"
