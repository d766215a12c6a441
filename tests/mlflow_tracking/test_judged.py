"""What runs in a real SQLite store are judged by, and that what no one score compares is kept apart."""

import pytest

from fedlora.config import RunConfig, configfile
from fedlora.config.recalled import recalled
from fedlora.errors import FedloraError
from fedlora.objective.classification import ACCURACY
from fedlora.objective.generation import LOSS
from fedlora.report.decision import decide
from mlflow_tracking import arrange, compare, judged, store, tracker, views
from mlflow_tracking.parents import Parent


def test_a_configuration_is_recalled_from_its_parameters():
    changes = {
        **{"task": "generation", "strategy": "zero-padding", "name": "4", "partition.name": "iid"},
        **{"lora.ranks": [2, 4], "clients": 2, "fraction": 0.5, "rounds": 3, "data.train_size": 7},
        **{"model.trust_remote_code": True, "channel.faults.crash": 0.25},
    }
    config = configfile.build(changes)
    flat = configfile.flatten(config.model_dump(mode="json"))
    told = {key: tracker._as_text(value) for key, value in flat.items() if value not in (None, {})}
    found = recalled(told)
    assert {key: value for key, value in configfile.flatten(found.model_dump(mode="json")).items() if key in told} == {
        key: value for key, value in flat.items() if key in told
    }
    assert (found.name, found.clients, found.lora.ranks) == ("4", 2, [2, 4])


def test_what_another_version_knew_is_left_out():
    found = recalled({"task": "generation", "strategy": "of a plug-in", "data.later": "x", "rounds": "many"})
    assert (found.task, found.strategy, found.rounds) == ("generation", "of a plug-in", RunConfig().rounds)


def test_a_run_is_judged_as_its_configuration_says_and_not_as_its_metrics_look(shelf, uri):
    """Also a decoder's run with a metric called accuracy, and a run from before there was a choice."""
    one = shelf.run("judged", "svd", 0, task="generation")
    other = shelf.run("judged", "svd", 1, score="loss")
    client = store.client(uri)
    assert judged.of(client.get_run(one)).criterion == LOSS
    assert judged.of(client.get_run(other)).criterion == ACCURACY
    assert judged.of(client.get_run(shelf.run("judged", "svd", 2, task="unheard-of"))) is None


def test_an_experiment_with_two_tasks_asks_for_one(shelf, uri):
    for seed in (0, 1):
        shelf.run("both", "svd", seed, 2.0, score="loss", task="generation")
        shelf.run("both", "fedit", seed, 0.5)
    shelf.run("both", "fedit", 2, 0.9)
    with pytest.raises(FedloraError) as error:
        compare.gather("both", uri)
    there = "both holds runs that no one score compares: generation (2 runs), classification (3 runs)"
    assert str(error.value) == f"{there}; choose one with --task=generation"
    found = compare.gather("both", uri, "generation")
    assert (found.criterion, found.labelled, set(found.runs["strategy"])) == (LOSS, False, {"svd"})
    assert "with task=generation" in found.note
    other = compare.gather("both", uri, "classification")
    assert (other.criterion, other.labelled, set(other.runs["strategy"])) == (ACCURACY, True, {"fedit"})
    with pytest.raises(FedloraError, match=r"--task=regresion: both has no finished run of it; there: generation \(2"):
        compare.gather("both", uri, "regresion")


def test_an_experiment_of_one_task_needs_no_choice(shelf, uri):
    shelf.run("losses", "svd", 0, 2.0, score="loss", task="generation")
    shelf.run("losses", "unheard", 0, 2.0, task="unheard-of")
    found = compare.gather("losses", uri)
    assert found.criterion == LOSS
    assert "task=" not in found.note
    assert [(each.status, each.reason) for each in found.excluded] == [
        ("unknown task", "task=unheard-of is not installed here")
    ]


def test_runs_of_one_task_that_are_judged_differently_are_kept_apart_too(shelf, uri):
    shelf.run("judgements", "svd", 0, 2.0, score="loss", task="generation")
    scorers = {"evaluation.generate.scorers": '["exact", "rouge-l"]'}
    shelf.run("judgements", "svd", 1, 0.5, score="exact", task="generation", **scorers)
    with pytest.raises(
        FedloraError, match=r"generation:loss \(1 run\), generation:exact \(1 run\); .* --task=generation:loss"
    ):
        compare.gather("judgements", uri)
    found = compare.gather("judgements", uri, "generation:exact")
    assert (found.criterion.name, found.criterion.higher_is_better) == ("exact", True)
    assert [score.name for score in found.scores] == ["exact", "rouge_l", "loss", "token_accuracy"]
    assert found.runs["final/exact"].tolist() == [0.5]


def test_a_sweep_of_losses_is_written_to_its_runs_best_first(shelf, uri):
    """By hand: fedit has 2.0 in the mean, svd 2.5."""
    parent = Parent(uri, shelf.experiment("falling"), shelf.sweep("falling", "falling", "falling-1"))
    losses = {("svd", 0): 2.4, ("svd", 1): 2.6, ("fedit", 0): 1.9, ("fedit", 1): 2.1}
    runs = {
        key: shelf.run("falling", *key, loss, parent=parent.run, score="loss", task="generation")
        for key, loss in losses.items()
    }
    comparison = compare.gather("falling-1", uri)
    arrange.decided(parent, "mine", comparison, decide(comparison))
    client = store.client(uri)
    placed = sorted(runs, key=lambda key: client.get_run(runs[key]).data.tags[views.PLACE])
    assert placed == [("fedit", 0), ("fedit", 1), ("svd", 0), ("svd", 1)]
    told = client.get_run(parent.run).data
    assert told.metrics == pytest.approx({"choice/loss/fedit": 2.0, "choice/loss/svd": 2.5})
    assert told.tags["verdict"].startswith("fedit has the best score, loss 2.000")


def test_the_list_of_a_sweep_without_a_view_begins_with_the_lowest_loss(shelf, uri):
    parent = shelf.sweep("unseen", "unseen")
    shelf.run("unseen", "svd", 0, 2.0, parent=parent, score="loss", task="generation")
    page = views.page(uri, shelf.experiment("unseen"), parent)
    assert page == store.sweep_page(shelf.experiment("unseen"), parent, LOSS)
    assert "orderByKey=metrics.%60final%2Floss%60&orderByAsc=true" in page
    assert "orderByKey=metrics.%60final%2Faccuracy%60&orderByAsc=false" in store.sweep_page("1", "2", ACCURACY)
