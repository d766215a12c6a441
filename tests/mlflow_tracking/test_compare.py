"""Runs read back from a real SQLite store: as a table, and as what a report holds."""

import json

import pandas as pd
import pytest
from mlflow import MlflowClient

from fedlora.errors import TrackingError
from mlflow_tracking import compare


def test_a_row_per_run_with_settings_and_results(shelf, uri):
    parent = shelf.sweep("table", "mine", "mine-1")
    run = shelf.run(
        "table", "svd", 3, 0.75, parent=parent, **{"lora.rank": 4, "data.name": "x.csv", "lora.ranks": "[2, 4]"}
    )
    under_way = shelf.run("table", "fedit", 0, status="RUNNING")
    found = compare.load("table", uri=uri)
    assert list(found["run_id"]) == [under_way, run]  # the latest first, no parent
    row = found.set_index("run_id").loc[run]
    assert (row["name"], row["status"], row["sweep"], row["strategy"]) == ("svd seed 3", "FINISHED", "mine-1", "svd")
    assert (row["seed"], row["partition"], row["final/accuracy"], row["lora.rank"]) == (3, "hash3", 0.75, 4)
    assert (row["data.name"], row["lora.ranks"]) == ("x.csv", "[2, 4]")
    assert row["started"].tzinfo is not None
    assert pd.isna(found.set_index("run_id").loc[under_way, "final/accuracy"])


def test_a_table_goes_straight_into_pandas(shelf, uri):
    for strategy, accuracy in (("svd", 0.6), ("svd", 0.8), ("fedit", 0.5)):
        shelf.run("pandas", strategy, int(accuracy * 10), accuracy)
    means = compare.load("pandas", uri=uri).groupby("strategy")["final/accuracy"].mean()
    assert means.to_dict() == {"fedit": 0.5, "svd": pytest.approx(0.7)}


def test_one_sweep_of_an_experiment(shelf, uri):
    first, second = shelf.sweep("two", "night", "night-1", start=1), shelf.sweep("two", "night", "night-2", start=2)
    old, new = shelf.run("two", "svd", 0, parent=first), shelf.run("two", "svd", 1, parent=second)
    assert list(compare.load("two", sweep="night", uri=uri)["run_id"]) == [new]  # the latest of that name
    assert list(compare.load("two", sweep="night-1", uri=uri)["run_id"]) == [old]
    with pytest.raises(TrackingError, match=r"has no sweep 'nigt'\. Did you mean 'night'\?"):
        compare.load("two", sweep="nigt", uri=uri)


def test_unknown_and_deleted_experiments_are_one_line(shelf, uri):
    shelf.experiment("newsgroups")
    with pytest.raises(TrackingError, match=r"no MLflow experiment 'newsgroup' in .*Did you mean 'newsgroups'\?"):
        compare.load("newsgroup", uri=uri)
    with pytest.raises(TrackingError, match=r"no sweep or experiment 'newsgroup'.*Did you mean 'newsgroups'\?"):
        compare.gather("newsgroup", uri)
    shelf.client.delete_experiment(shelf.experiment("thrown-away"))
    for read in (compare.load, compare.gather):
        with pytest.raises(TrackingError, match="'thrown-away' was deleted; restore it"):
            read("thrown-away", uri=uri)


def test_an_empty_experiment_is_an_empty_table(shelf, uri):
    shelf.experiment("empty")
    found = compare.load("empty", uri=uri)
    assert found.empty
    assert "strategy" in found.columns


def test_an_experiment_s_finished_runs_with_their_files(shelf, uri):
    repeated, kept = shelf.run("all", "svd", 0, 0.1), shelf.run("all", "svd", 0, 0.9)
    other = shelf.run("all", "fedit", 0, 0.5, files=False)
    shelf.run("all", "fedit", 1, status="FAILED")
    found = compare.gather("all", uri)
    assert set(found.runs["run_id"]) == {kept, other}
    assert repeated not in set(found.rounds["run_id"])
    points = found.rounds[found.rounds["run_id"] == kept]
    assert list(zip(points["round"], points["global/accuracy"], strict=True)) == [(0, 0.0), (1, 0.9)]
    assert found.modules.to_dict("records") == [{"run_id": kept, "round": 1, "module": "m", "rho": 0.25}]
    assert found.clients["examples"].tolist() == [7]
    assert found.configs == {kept: {"strategy": "svd", "lora.rank": 4}}
    assert {(entry.label, entry.status) for entry in found.excluded} == {
        ("svd seed 0", "repeated"),
        ("fedit seed 1", "failed"),
    }


def test_a_sweep_s_partition_is_read_once(shelf, uri):
    parent = shelf.sweep("once", "shared-partition")
    for strategy in ("svd", "fedit"):
        shelf.run("once", strategy, 0, parent=parent)
    found = compare.gather("shared-partition", uri)
    assert found.partitions == {"hash0": shelf.counts}
    assert list(found.runs["strategy"]) == ["svd", "fedit"]  # in the order in which they were made


def test_only_runs_that_the_cells_name_belong_to_a_sweep(shelf, uri):
    parent = shelf.sweep("cells", "celled", "celled-1")
    elsewhere = shelf.run("cells-before", "svd", 0)  # finished in an earlier execution
    shelf.run("cells", "fedit", 5, parent=parent)  # a child that is no cell any more
    deleted = shelf.run("cells", "fedit", 0, parent=parent)
    shelf.client.delete_run(deleted)
    cells = [
        {"label": "svd seed=0", "settings": {}, "digest": "d", "status": "finished", "reason": None, "run": elsewhere},
        {"label": "fedit seed=0", "settings": {}, "digest": "e", "status": "finished", "reason": None, "run": deleted},
        {"label": "local seed=0", "settings": {}, "digest": "f", "status": "finished", "reason": None, "run": "0" * 32},
        {"label": "flora seed=0", "settings": {}, "digest": None, "status": "skipped", "reason": "no", "run": None},
        {"label": "ravan seed=0", "settings": {}, "digest": "g", "status": "failed", "reason": "it broke", "run": None},
    ]
    shelf.file(
        parent,
        "sweep.json",
        {
            "name": "celled",
            "base": "demo",
            "grid": {"seed": [0]},
            "cells": cells,
            "compare": {"choices": ["model"], "conditions": []},
        },
    )
    found = compare.gather("celled-1", uri)
    assert list(found.runs["run_id"]) == [elsewhere]
    assert [(entry.label, entry.status) for entry in found.excluded] == [
        ("fedit seed=0", "gone"),
        ("local seed=0", "gone"),
        ("flora seed=0", "skipped"),
        ("ravan seed=0", "failed"),
    ]
    assert found.excluded[3].reason == "it broke"
    assert found.roles.is_choice("model.name")
    assert "celled-1" in found.note
    assert "seed: 0" in found.note
    assert "{" not in found.note  # words, not JSON


def test_latest_is_the_sweep_that_ended_last(new_shelf, with_databases, tmp_path):
    uri = f"sqlite:///{with_databases(tmp_path, 'mlflow.db') / 'mlflow.db'}"
    shelf = new_shelf(uri)
    with pytest.raises(TrackingError, match="no sweep has ended"):
        compare.find("latest", uri)
    late = shelf.sweep("x", "began-first", end=False)
    early = shelf.sweep("x", "began-second", end=False)
    shelf.sweep("x", "under-way", end=False)
    shelf.client.set_terminated(early, end_time=1000)
    shelf.client.set_terminated(late, end_time=2000)
    assert compare.find("latest", uri).parent.info.run_id == late


def test_a_sweep_comes_before_an_experiment_of_the_same_name(shelf, uri):
    parent = shelf.sweep("namesake", "namesake")
    run = shelf.run("namesake", "svd", 0)
    assert compare.find("namesake", uri).parent.info.run_id == parent
    assert compare.find("experiment:namesake", uri).parent is None
    assert list(compare.gather("experiment:namesake", uri).runs["run_id"]) == [run]


def test_an_artifact_that_cannot_be_read_is_left_out(shelf, uri):
    run = shelf.run("damaged", "svd", 0)
    (shelf.folder / "partition.json").write_text("{")
    shelf.client.log_artifact(run, str(shelf.folder / "partition.json"))
    assert compare.gather("damaged", uri).partitions == {}


def test_answers_are_read_from_the_table_that_mlflow_shows(shelf, uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # `load_table` asks for runs there, whatever its client is of
    said, silent = shelf.run("said", "svd", 0), shelf.run("said", "fedit", 0)
    table = {"columns": ["round", "row", "answer", "exact"], "data": [[0, 3, "no", 0.0], [2, 3, "a dog", 1.0]]}
    shelf.file(said, "tables/answers.json", table)
    tag = [{"path": "tables/answers.json", "type": "table"}]
    shelf.client.set_tag(said, "mlflow.loggedArtifacts", json.dumps(tag))
    found = compare.gather("said", uri).answers
    assert found.to_dict("records")[1] == {"run_id": said, "round": 2, "row": 3, "answer": "a dog", "exact": 1.0}
    assert len(found) == 2
    assert silent not in set(found["run_id"])
    assert list(shelf.client.load_table(shelf.experiment("said"), "tables/answers.json", [said])["answer"]) == [
        "no",
        "a dog",
    ]


def test_nothing_becomes_the_active_run(shelf, uri):
    import mlflow

    shelf.run("quiet", "svd", 0)
    compare.gather("quiet", uri)
    assert mlflow.active_run() is None
    assert len(MlflowClient(uri).search_runs([shelf.experiment("quiet")])) == 1
