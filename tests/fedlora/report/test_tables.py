"""Tables of a made-up comparison, against values known by hand."""

import math

import pandas as pd
import pytest

from fedlora.report import frames, tables, views


def cells(table, title):
    return [row[list(table.titles).index(title)].text for row in table.rows]


def test_settings_are_what_varies_but_the_seed(make):
    found = frames.settings(make(ranks=(4, 8)).runs)
    assert [setting.label for setting in found][:2] == ["svd lora.rank=4", "svd lora.rank=8"]
    assert found[0].seeds == {0: "svd-4-0", 1: "svd-4-1", 2: "svd-4-2"}
    assert found[0].rest == "lora.rank=4"


def test_where_and_how_runs_were_made_is_no_setting(comparison):
    assert comparison.runs["runner.kind"].nunique() == 2
    assert frames.varied(comparison.runs) == ["strategy"]


def test_a_setting_that_only_some_have_tells_them_apart(make):
    runs = make().runs
    runs["strategy_options.beta"] = [0.5 if s == "svd" else None for s in runs["strategy"]]
    labels = [setting.label for setting in frames.settings(runs)]
    assert labels == ["svd strategy_options.beta=0.5", "fedit", "local"]


def test_results_of_a_run(comparison):
    row = tables.results(comparison).loc["fedit-8-1"]
    assert (row["accuracy"], row["macro_f1"], row["gap"]) == (pytest.approx(0.66), pytest.approx(0.56), 0.05)
    assert (row["rho_first"], row["rho_mean"], row["rho_last"]) == (0.4, pytest.approx(0.3), 0.2)
    assert (row["rho_floor"], row["megabytes"], row["seconds"]) == (0.05, 2.0, 5.0)


def test_the_leaderboard_is_ordered_and_compares_with_the_best(comparison):
    rows = tables.leaderboard(comparison)
    assert [row.setting.label for row in rows] == ["svd", "fedit", "local"]
    best, second, third = rows
    assert best.paired is None
    assert best.results["accuracy"].mean == pytest.approx(0.7)
    assert best.results["accuracy"].half == pytest.approx(0.2484138, abs=1e-6)
    assert second.paired.difference.mean == pytest.approx(-0.04)
    assert second.holm == pytest.approx(1 - math.sqrt(12 / 14))  # the only test: local's difference has no spread
    assert third.paired.why.startswith("the same difference")
    frame = tables.leaderboard_frame(rows)
    assert list(frame["setting"]) == ["svd", "fedit", "local"]
    assert frame.loc[0, "seeds"] == "0 1 2"
    assert tables.paired_frame(rows)["best"].unique().tolist() == ["svd"]


def test_a_setting_with_fewer_seeds_is_no_standard(make):
    lucky = make({"svd": {0: 0.6, 1: 0.7}, "fedit": {0: 0.9}})
    rows = tables.leaderboard(lucky)
    assert [row.setting.label for row in rows] == ["fedit", "svd"]
    assert [row.paired is None for row in rows] == [False, True]
    assert rows[0].paired.why == "one common seed: two are needed"


def test_what_can_be_said_of_the_best(make, comparison):
    assert "The only other tested setting does not differ" in views.verdict(tables.leaderboard(comparison))
    one_seed = tables.leaderboard(make({"svd": {0: 0.6}, "fedit": {0: 0.9}}))
    assert "fedit has the highest accuracy. Each setting ran with one seed" in views.verdict(one_seed)
    clear = make({"svd": {0: 0.60, 1: 0.61, 2: 0.62}, "fedit": {0: 0.30, 1: 0.311, 2: 0.321}})
    assert "1 of 1 tested setting differs from it (p < 0.05" in views.verdict(tables.leaderboard(clear))
    equal = make({"svd": {0: 0.6, 1: 0.5}, "fedit": {0: 0.5, 1: 0.6}})
    assert "All settings have the same mean accuracy" in views.verdict(tables.leaderboard(equal))
    assert "nothing to compare" in views.verdict(tables.leaderboard(make({"svd": {0: 0.6}})))


def test_one_seed_shows_no_interval(make):
    board = views.leaderboard(tables.leaderboard(make({"svd": {0: 0.6}, "fedit": {0: 0.5}})))
    assert cells(board, "accuracy") == ["0.600", "0.500"]
    assert cells(board, "difference from best") == ["best", "−0.100"]
    assert cells(board, "p (Holm)") == ["–", "–"]


def test_rho_against_accuracy_with_and_without_what_sends_nothing(comparison):
    found = {(entry.rho, entry.points): entry.found for entry in tables.correlations(comparison)}
    assert found["ρ in round 1", "settings, means over seeds"].n == 3
    assert found["ρ in round 1", "settings, means over seeds"].spearman == pytest.approx(-1)
    assert found["ρ in round 1, where below 1", "settings, means over seeds"].why.startswith("2 points")
    assert found["ρ in round 1, where below 1", "runs"].n == 6
    assert found["ρ in round 1", "runs"].n == 9


def test_costs_are_sums_over_rounds(comparison):
    board = views.costs(comparison)
    assert cells(board, "up: adapter (MB)") == ["2.00"] * 3
    assert cells(board, "rounds, all (s)") == ["5.0"] * 3
    assert cells(board, "down: base (MB)") == ["–"] * 3  # not measured


def test_shared_partition_and_seeds(comparison):
    found = tables.sharing(comparison)
    assert (found.partition, found.seeds) == (True, True)
    assert "All runs of one seed have the same partition" in found.partition_words


def test_a_partition_that_differs_within_a_seed_is_named(make):
    runs = make().runs
    runs.loc[0, "partition"] = "other"
    found = tables.sharing(make(runs=runs))
    assert not found.partition
    assert "within seed=0" in found.partition_words
    runs.loc[0, "partition"] = None
    assert "1 of 9 runs have no partition hash" in tables.sharing(make(runs=runs)).partition_words


def test_partitions_may_differ_where_they_were_varied(make):
    runs = make().runs
    again = runs.assign(run_id=runs["run_id"] + "b", partition=runs["partition"] + "b", clients=8)
    found = tables.sharing(make(runs=pd.concat([runs, again], ignore_index=True)))
    assert found.partition
    assert "seed and value of clients" in found.partition_words


def test_missing_seeds_are_named(make):
    found = tables.sharing(make({"svd": {0: 0.6, 1: 0.7}, "fedit": {0: 0.9}}))
    assert not found.seeds
    assert "fedit lacks 1" in found.seeds_words


def test_configurations_are_split_into_shared_and_own(comparison):
    found = views.configs(comparison)
    assert found.shared == {"rounds": "2", "lora.ranks": "–"}
    assert found.own[0] == ("svd seed 0 (svd-8-0)", {"strategy": "svd", "seed": "0"})
