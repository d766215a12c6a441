"""Test examples that are answered in writing: when, which, by whom, and what is kept of it."""

import json

import pytest

from fedlora.config import configfile
from fedlora.errors import ConfigError, DataError, ModelError
from fedlora.run import export, preflight, rounds
from fedlora.run.loop import train
from fedlora.run.records import Setup
from fedlora.run.runfolder import RunFolder

ASKED = {
    "evaluation.generate.scorers": ["choice", "exact"],
    "evaluation.generate.examples": 10,
    "evaluation.generate.local_examples": 3,
    "evaluation.generate.batch_size": 4,
    "evaluation.generate.max_new_tokens": 4,
    "evaluation.generate.shown": 6,
    "evaluation.generate.every": 2,
    "rounds": 3,
    "training.local_steps": 12,
}


@pytest.fixture(scope="module")
def configure(writing):
    return lambda changes=None: configfile.build({**writing, **ASKED, **(changes or {})})


@pytest.fixture(scope="module")
def run(configure, shared):
    return RunFolder(shared("answering", lambda path: train(configure(), path)))


@pytest.fixture(scope="module")
def values(run):
    return {record.round: dict(record.metrics) for record in rounds.records(run)}


def test_answers_are_judged_before_after_and_every_so_often(values):
    assert [number for number in values if "global/choice" in values[number]] == [0, 2, 3]
    for number in (0, 2, 3):
        assert values[number]["global/answers"] == 10
        assert 0 <= values[number]["global/exact"] <= 1
        assert values[number]["gap/choice"] == pytest.approx(
            values[number]["local/choice"] - values[number]["global/choice"]
        )
    assert all("global/loss" in each and "gap/loss" in each for each in values.values())


def test_the_first_scorer_decides(run):
    assert (run.score.name, run.score.higher_is_better) == ("choice", True)
    assert [each.name for each in run.objective.scores_of(run.config)] == ["choice", "exact", "loss", "token_accuracy"]


def test_the_loss_may_still_decide(configure, run):
    config = configure({"evaluation.generate.decides": "loss"})
    assert run.objective.score_of(config).name == "loss"
    assert [each.name for each in run.objective.scores_of(config)] == ["loss", "choice", "exact", "token_accuracy"]


def test_the_sample_is_kept_with_its_verdicts(run, values):
    content = json.loads((run.path / "tables" / "answers.json").read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    assert len(rows) == 3 * 6
    drawn = rounds.answered_rows(run)
    assert [row["row"] for row in rows if row["round"] == 3] == sorted(drawn[:6].tolist())
    assert all(row["exact"] == (row["answer"].lower().strip(" .") == row["reference"]) for row in rows)
    assert all(row["choice"] == (row["chosen"] == row["reference"]) for row in rows)
    assert {row["reference"] for row in rows} <= {f"a kind of {kind}" for kind in ("animal", "plant", "person")}
    assert all(row["prompt"].startswith("What is it?\n\n") for row in rows)


def test_nothing_is_kept_of_a_round_without(run):
    assert export.answers(run, 1) is None
    assert export.answers(run, 2)


def test_a_resumed_run_answers_the_same(run, configure, tmp_path):
    def stop(record):
        if record.round == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(configure(), tmp_path / "run", stop)
    train(configure(), tmp_path / "run")
    kept = [record["rows"].get("answers") for record in RunFolder(tmp_path / "run").closed()]
    assert kept[3]
    assert kept == [record["rows"].get("answers") for record in run.closed()]


def test_a_personal_strategy_has_each_answer_by_one_client(configure, tmp_path):
    train(configure({"strategy": "local", "rounds": 1}), tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    parts = [part for part in rounds.evaluation_parts(run, 1) if part.split == "answers"]
    assert [(part.client, part.start, part.step) for part in parts] == [(0, 0, 3), (1, 1, 3), (2, 2, 3)]
    assert rounds.records(run)[-1].metrics["global/answers"] == 10


@pytest.mark.parametrize(
    ("changes", "every"),
    [
        ({"evaluation.generate.every": 5}, 5),
        # 3 clients × 12 steps × 8 of 96 tokens are trained, (10 + 9) × (32 + 4) are written: 2.5 % of 27,648
        ({"evaluation.generate.every": None, "evaluation.generate.share": 0.2}, 1),
        ({"evaluation.generate.every": None, "evaluation.generate.share": 0.02}, 2),
        ({"evaluation.generate.every": None, "evaluation.generate.share": 0.002}, 13),
        (
            {
                "evaluation.generate.every": None,
                "evaluation.generate.share": 0.02,
                "training.local_epochs": 1.0,  # of four steps
                "training.local_steps": None,
            },
            4,
        ),
    ],
)
def test_writing_takes_no_more_than_its_share(configure, changes, every):
    assert rounds.answers_every(configure(changes), 96) == every


def test_without_scorers_nothing_is_written(configure, run):
    plain = configure({"evaluation.generate.scorers": []})
    assert plain.digest() != run.config.digest()
    assert run.objective.score_of(plain).name == "loss"


REFUSED = [
    ({"evaluation.generate.scorers": ["code"]}, ConfigError, "evaluation.execute_code=true"),
    ({"evaluation.generate.scorers": ["exat"]}, ConfigError, "Did you mean 'exact'"),
    ({"evaluation.generate.max_new_tokens": 200}, ModelError, "are 296 tokens together, but .* at most 256"),
]


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED)
def test_what_cannot_be_judged_is_refused_before_a_run(configure, changes, error, words):
    with pytest.raises(error, match=words):
        preflight.check(configure(changes))


def test_a_classifier_writes_nothing(tiny):
    config = configfile.build({**tiny, "evaluation.generate.scorers": ["exact"]})
    with pytest.raises(ConfigError, match="task=classification writes nothing"):
        preflight.check(config)


@pytest.mark.parametrize(("scorer", "words"), [("numeric", "a number in the response"), ("code", "tests")])
def test_references_that_do_not_fit_are_refused_before_training(configure, tmp_path, scorer, words):
    config = configure({"evaluation.generate.scorers": [scorer], "evaluation.execute_code": True})
    with pytest.raises(DataError, match=f"scorers={scorer} expects {words}"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "rounds").exists()
    assert Setup.known(RunFolder(tmp_path / "run")) is None
