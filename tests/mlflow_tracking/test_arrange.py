"""What a sweep shows in MLflow, read back from a real SQLite store: its view, its runs' places, its own run."""

import base64
import json
import zlib

import pytest

from fedlora.objective.classification import ACCURACY
from fedlora.report.decision import decide
from mlflow_tracking import arrange, compare, parents, store, views
from mlflow_tracking.parents import Parent

ACCURACIES = {
    ("svd", 0.1): (0.5, 0.7),
    ("fedit", 0.1): (0.6, 0.8),
    ("svd", 100): (0.9, 0.9),
    ("fedit", 100): (0.7, 0.8),
}


@pytest.fixture
def parent(shelf, uri, request):
    name = request.node.originalname
    return Parent(uri, shelf.experiment(name), shelf.sweep(name, name, f"{name}-1"))


def state(uri, parent):
    """A saved view as MLflow's page unpacks it."""
    tag = store.client(uri).get_experiment(parent.experiment).tags[f"mlflow.sharedViewState.{parent.run}"]
    view = json.loads(tag)
    kind, _, packed = view["state"].partition(";")
    assert kind == "deflate"
    assert len(tag) < 1500  # every load of the experiment's page carries all views
    return view["name"], json.loads(zlib.decompress(base64.b64decode(packed)))


def test_the_view_shows_every_run_of_the_sweep_with_accuracy_and_rho_first(uri, parent):
    views.save(
        store.client(uri), parent.experiment, parent.run, "mine", ACCURACY, ["strategy", "partition.alpha", "seed"]
    )
    name, found = state(uri, parent)
    assert name == "mine"
    assert (found["runsHiddenMode"], found["isAccordionReordered"]) == ("SHOW_ALL", True)
    assert found["searchFilter"] == f"tags.`mlflow.parentRunId` = '{parent.run}'"
    first = [
        chart["metricKey"] for chart in found["compareRunCharts"] if chart["metricSectionId"] == views.first(ACCURACY)
    ]
    assert first == ["global/accuracy", "rho/model", "final/accuracy"]
    assert found["compareRunSections"][0]["uuid"] == views.first(ACCURACY)
    assert found["selectedColumns"][:2] == ["params.`partition.alpha`", "params.`seed`"]


def test_the_page_of_a_sweep_without_a_view_is_a_filtered_list(uri, parent):
    assert views.page(uri, parent.experiment, parent.run) == store.sweep_page(parent.experiment, parent.run, ACCURACY)
    views.save(store.client(uri), parent.experiment, parent.run, "mine", ACCURACY)
    assert views.page(uri, parent.experiment, parent.run) == store.view_page(parent.experiment, parent.run)


def test_a_decision_is_written_to_the_runs_and_to_the_sweep(shelf, uri, parent, request):
    """By hand: at 0.1 fedit leads with 0.7 against 0.6, at 100 svd with 0.9 against 0.75."""
    experiment = request.node.originalname
    runs = {
        (strategy, alpha, seed): shelf.run(
            experiment, strategy, seed, accuracy, parent=parent.run, **{"partition.alpha": alpha}
        )
        for (strategy, alpha), accuracies in ACCURACIES.items()
        for seed, accuracy in enumerate(accuracies)
    }
    comparison = compare.gather(f"{experiment}-1", uri)
    decision = decide(comparison)
    for _ in range(2):  # the second time changes nothing
        arrange.decided(parent, "mine", comparison, decision)
    client = store.client(uri)
    placed = sorted(runs, key=lambda key: client.get_run(runs[key]).data.tags[views.PLACE])
    assert placed == [
        (strategy, alpha, seed)
        for alpha, order in ((0.1, ("fedit", "svd")), (100, ("svd", "fedit")))
        for strategy in order
        for seed in (0, 1)
    ]
    found = client.get_run(parent.run).data
    assert found.metrics == pytest.approx(
        {
            "choice/accuracy at alpha 0.1/fedit": 0.7,
            "choice/accuracy at alpha 0.1/svd": 0.6,
            "choice/accuracy at alpha 100/fedit": 0.75,
            "choice/accuracy at alpha 100/svd": 0.9,
        }
    )
    points = client.get_metric_history(parent.run, "choice/accuracy at alpha 0.1/fedit")
    assert [(point.step, point.value) for point in points] == [(0, 0.0), (1, pytest.approx(0.7))]
    assert found.tags["verdict"].startswith("At partition.alpha=0.1: fedit has the highest score")
    assert state(uri, parent)[1]["selectedColumns"][:2] == ["params.`partition.alpha`", "params.`seed`"]


def test_the_settings_of_a_sweep_are_its_parameters_and_what_is_added_later_stands_apart(uri, parent):
    def told():
        return store.client(uri).get_run(parent.run).data.params

    swept = {"strategy": ["svd", "svd", "fedit"], "lora.ranks": ["[2, 4]", "null", "null"], "seed": [0, 1, 0]}
    arrange.begun(parent, "mine", ACCURACY, {"base": "demo", "clients": 4, "seed": 7}, swept)
    first = {"base": "demo", "clients": "4", "strategy": "svd, fedit", "lora.ranks": "[2,4], null", "seed": "0, 1"}
    assert told() == first
    for seeds in ([0, 1], [0, 1, 10], [0, 1, 10, 2]):
        arrange.begun(parent, "mine", ACCURACY, {"base": "demo", "clients": 4}, {**swept, "seed": seeds})
    assert told() == {**first, "seed.added": "10", "seed.added.added": "2"}


def test_a_sweep_says_what_made_it(uri, tmp_path, monkeypatch):
    from fedlora.config import configfile

    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path))
    tracking = configfile.build({"tracking.uri": uri}).tracking
    tags = store.client(uri).get_run(parents.start(tracking, "mine", "mine-1", "").run).data.tags
    assert (tags["mlflow.source.name"], tags["mlflow.source.type"]) == ("fedlora sweep mine", "LOCAL")
