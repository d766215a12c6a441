"""Tables of a made-up comparison, against values known by hand."""

import math

import pandas as pd
import pytest

from fedlora.report import boards, frames, marks, tables, views
from fedlora.report.decision import decide


def cells(table, title):
    return [row[list(table.titles).index(title)].text.replace("\u00a0", " ") for row in table.rows]


def test_settings_are_what_varies_but_the_seed(make):
    found = frames.settings(make(ranks=(4, 8)).runs)
    assert [setting.label for setting in found][:2] == ["svd lora.rank=4", "svd lora.rank=8"]
    assert found[0].seeds == {0: "svd-4-0", 1: "svd-4-1", 2: "svd-4-2"}
    assert {look.rest for look in marks.looks(decide(make(ranks=(4, 8))))} == {"lora.rank=4", "lora.rank=8"}


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
    assert (row["rho_floor"], row["megabytes"], row["seconds"]) == (0.05, 2.0, 4.0)


def board(comparison):
    (only,) = decide(comparison).conditions
    return only


def test_the_leaderboard_is_ordered_and_compares_with_the_best(comparison):
    best, second, control = (*board(comparison).standings, *board(comparison).controls)
    assert [each.choice for each in (best, second, control)] == ["svd", "fedit", "local"]
    assert best.paired is None
    assert best.score.mean == pytest.approx(0.7)
    assert best.score.high == pytest.approx(0.7 + 0.2484138, abs=1e-6)
    assert second.paired.difference.mean == pytest.approx(-0.04)
    assert second.holm == pytest.approx(1 - math.sqrt(12 / 14))  # the only test: local is a control
    assert control.paired.why.startswith("the same difference")
    frame = boards.leaderboard_frame(decide(comparison))
    assert list(frame["setting"]) == ["svd", "fedit", "local"]
    assert frame.loc[0, "seeds"] == "0 1 2"
    assert boards.paired_frame(decide(comparison))["best"].tolist() == ["svd"]


def test_a_setting_with_fewer_seeds_is_no_standard(make):
    found = board(make({"svd": {0: 0.6, 1: 0.7}, "fedit": {0: 0.9}}))
    assert [each.choice for each in found.standings] == ["fedit", "svd"]
    assert found.best.choice == "svd"
    assert found.standings[0].paired.why == "one common seed: two are needed"


def test_two_seeds_are_both_shown_and_one_alone(make):
    two = boards.leaderboard(board(make({"svd": {0: 0.6, 1: 0.5}, "fedit": {0: 0.5, 1: 0.38}})))
    assert cells(two, "accuracy") == ["0.550 (0.600, 0.500)", "0.440 (0.500, 0.380)"]
    one = boards.leaderboard(board(make({"svd": {0: 0.6}, "fedit": {0: 0.5}})))
    assert cells(one, "accuracy") == ["0.600", "0.500"]
    assert cells(one, "below the best") == ["best", "0.100"]
    assert cells(one, "p (Holm)") == ["–", "–"]
    assert "of the possible" not in one.titles  # local and oracle did not run


def test_rho_against_accuracy_with_and_without_what_sends_nothing(comparison):
    found = {(entry.rho, entry.points): entry.found for entry in tables.correlations(comparison)}
    assert found["ρ in round 1", "settings, means over seeds"].n == 3
    assert found["ρ in round 1", "settings, means over seeds"].spearman == pytest.approx(-1)
    assert found["ρ in round 1, where below 1", "settings, means over seeds"].why.startswith("2 points")
    assert found["ρ in round 1, where below 1", "runs"].n == 6
    assert found["ρ in round 1", "runs"].n == 9


def test_costs_are_sums_over_rounds(comparison):
    board = views.costs(comparison, decide(comparison))
    assert cells(board, "up: adapter (MB)") == ["2.00"] * 3
    assert cells(board, "rounds, all (s)") == ["4.0"] * 3
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
