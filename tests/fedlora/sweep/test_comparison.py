"""Finished runs side by side."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from fedlora import metrics
from fedlora.metrics import RoundRecord
from fedlora.run import rounds
from fedlora.run.runfolder import RunFolder
from fedlora.sweep import comparison
from fedlora.sweep.comparison import COLUMNS, DETAILS, Result


@pytest.fixture(scope="module")
def cells(finished) -> list[Result]:
    """Two strategies, two seeds."""
    grid = [{"strategy": strategy, "seed": seed} for strategy in ("svd", "fedit") for seed in (0, 1)]
    folders = [finished({k: v for k, v in settings.items() if v not in ("fedit", 0)}) for settings in grid]
    return [Result.of_folder(settings, folder) for settings, folder in zip(grid, folders, strict=True)]


def test_a_row_is_the_end_of_a_run(finished):
    found = comparison.row(rounds.records(RunFolder(finished())))
    first, last = (rounds.records(RunFolder(finished()))[number].metrics for number in (1, 2))
    assert tuple(found) == (*COLUMNS, *DETAILS)
    both = first["abo/R"], last["abo/R"]
    assert found["mean R"] == pytest.approx(sum(both) / 2)
    assert both[0] != both[1]
    assert (found["accuracy"], found["macro-F1"]) == (last["global/accuracy"], last["global/macro_f1"])
    assert found["gap"] == last["gap/accuracy"]
    assert (found["ρ first"], found["ρ last"]) == (first["rho/model"], last["rho/model"])
    assert found["ρ first"] != found["ρ last"]
    assert found["ρ floor"] == last["rho/floor"]
    assert found["MB"] == last["bytes/total"] / 1e6
    spent = [record.metrics["time/round_s"] for record in rounds.records(RunFolder(finished()))]
    assert len(spent) == 3
    assert found["seconds"] == pytest.approx(sum(spent[1:]))  # a run may have the scores before training from another


def test_what_was_not_measured_is_none(finished):
    records = rounds.records(RunFolder(finished({"evaluation.local": False})))
    assert comparison.row(records)["gap"] is None


def test_a_frame_has_settings_results_partition_and_run(cells):
    table = comparison.frame(cells)
    assert list(table.columns) == ["strategy", "seed", *COLUMNS, *DETAILS, "partition", "run"]
    assert list(table["strategy"]) == ["svd", "svd", "fedit", "fedit"]
    assert table["run"][2] == cells[2].run
    assert table["partition"][0] == table["partition"][2] != table["partition"][1]


@pytest.mark.parametrize(
    ("column", "mean", "spread", "shown"),
    [
        ("accuracy", 0.43, math.nan, "0.430"),
        ("accuracy", 0.4125, 0.01, "0.412 ± 0.010"),
        ("MB", 1234.56, 0.04, "1234.6 ± 0.0"),
        ("seconds", 38.2, math.nan, "38"),
        ("gap", None, math.nan, "–"),
    ],
)
def test_a_column_has_the_same_decimals_in_every_row(column, mean, spread, shown):
    assert comparison.cell(column, mean, spread) == shown


def test_over_seeds_is_the_mean_and_the_sample_deviation(cells):
    table = comparison.frame(cells)
    mean, std = comparison.over_seeds(table, ["strategy", "seed"])
    assert list(mean.index) == ["svd", "fedit"]  # in the order in which they came
    for position, strategy in enumerate(("svd", "fedit")):
        for column in COLUMNS:
            values = table[column][2 * position : 2 * position + 2].to_numpy()
            assert mean.loc[strategy, column] == pytest.approx(values.mean())
            assert std.loc[strategy, column] == pytest.approx(values.std(ddof=1))
    assert std.loc["fedit", "ρ last"] > 0


def test_over_seeds_keeps_other_settings_apart_and_makes_do_with_seeds_alone(cells):
    table = comparison.frame(cells).assign(rank=[4, 8, 4, 8])
    mean, _ = comparison.over_seeds(table, ["strategy", "rank", "seed"])
    assert list(mean.index) == [("svd", 4), ("svd", 8), ("fedit", 4), ("fedit", 8)]
    mean, _ = comparison.over_seeds(comparison.frame(cells[:2]), ["seed"])
    assert list(mean.index) == ["all seeds"]


def test_one_seed_has_no_deviation(cells):
    _, std = comparison.over_seeds(comparison.frame(cells[:1]), ["strategy", "seed"])
    assert std.isna().all(axis=None)


def test_a_column_that_no_run_measured_stays_empty(finished):
    settings = {"strategy": "fedit"}
    table = comparison.frame([Result.of_folder(settings, finished({"evaluation.local": False}))])
    mean, _ = comparison.over_seeds(table, ["strategy"])
    assert math.isnan(mean.loc["fedit", "gap"])
    assert mean.loc["fedit", "accuracy"] == table["accuracy"][0]


def test_same_partition_is_asked_seed_by_seed(cells):
    table = comparison.frame(cells)
    assert comparison.same_partition(table)
    assert not comparison.same_partition(table.drop(columns="seed"))
    other = pd.concat([table, table.iloc[:1].assign(partition="another")])
    assert not comparison.same_partition(other)
    assert "differ" in comparison.shared(other)
    hashes = sorted(set(table["partition"]))
    assert comparison.shared(table) == (
        f"2 partitions (hashes {', '.join(hashes)}), one for each seed: "
        "runs that share it differ in the other settings only."
    )


@pytest.mark.parametrize(
    ("columns", "hashes", "words"),
    [
        ({"strategy": ["svd"]}, "a", "partition hash a"),
        ({"strategy": ["svd", "fedit"]}, "aa", "All 2 runs share one partition (hash a): "),
        ({"seed": [0, 1, 2]}, "aaa", "All 3 runs share one partition (hash a): "),
        ({"seed": [0, 1]}, "ab", "2 partitions (hashes a, b): each run has one of its own, by its seed."),
        ({"partition.alpha": [1, 5]}, "ab", "2 partitions (hashes a, b): each run has one of its own, "),
        ({"seed": [0, 0, 1], "clients": [2, 2, 2]}, "aab", "2 partitions (hashes a, b), one for each seed and "),
        ({"strategy": ["svd", "fedit"]}, "ab", "The runs differ in their partition, "),
        ({"seed": [0, 0, 1]}, "abb", "Runs of the same seed differ in their partition, "),
    ],
)
def test_what_is_said_of_the_partitions_is_true_of_them(columns, hashes, words):
    assert comparison.shared(pd.DataFrame({**columns, "partition": list(hashes)})).startswith(words)


def record(number, **values):
    return RoundRecord(number, 0, (), {metrics.BYTES_TOTAL: 0.0, metrics.TIME_ROUND: 1.0, **values})


def measured(used, rho, **more):
    """The metrics of a round of training."""
    abo = dict.fromkeys(DETAILS.values(), 0.0)
    return {**abo, "rho/model": rho, "rho/floor": 0.1, "rho/excess": rho - 0.1, "clients/completed": used, **more}


def test_where_one_client_took_part_there_is_no_rho():
    found = comparison.row([record(0), record(1, **measured(1, 0.0)), record(2, **measured(4, 0.3))])
    assert (found["ρ first"], found["ρ last"], found["ρ floor"], found["clients used"]) == (None, 0.3, 0.1, 2.5)
    found = comparison.row([record(0), record(1, **measured(4, 0.3)), record(2, **measured(1, 0.0))])
    assert (found["ρ first"], found["ρ last"], found["ρ floor"]) == (0.3, None, None)
    table = comparison.frame([Result({"strategy": "svd"}, [record(0), record(1, **measured(1, 0.0))], "a", "run")])
    mean, _ = comparison.over_seeds(table, ["strategy"])
    assert math.isnan(mean.loc["svd", "ρ first"])
    assert mean.loc["svd", "clients used"] == 1


def test_a_run_of_an_older_version_is_compared_too():
    """Without the seconds of reading and divergence, and the number of clients."""
    known = {key: value for key, value in measured(3, 0.2).items() if key != "clients/completed"}
    found = comparison.row([record(0), record(1, **known)])
    assert (found["ρ first"], found["clients used"], found["seconds"]) == (0.2, None, 1.0)


def test_a_resumed_round_counts_as_the_mean_of_those_that_were_not():
    again = {"time/resumed": 1.0, "time/round_s": 0.5}
    trained = [record(number, **measured(4, 0.3, **{"time/round_s": 10.0 * number})) for number in (1, 2)]
    resumed = record(3, **measured(4, 0.3, **again))
    assert comparison.row([record(0), *trained])["seconds"] == 30
    assert comparison.row([record(0), *trained, resumed])["seconds"] == 30 + 15
    assert comparison.row([record(0), resumed])["seconds"] is None


def test_where_the_dealing_is_varied_each_way_of_dealing_is_asked(cells):
    table = comparison.frame(cells).drop(columns="seed").assign(**{"partition.alpha": [0.1, 0.5, 0.1, 0.5]})
    assert comparison.same_partition(table)
    assert not comparison.same_partition(table.assign(**{"partition.alpha": 0.1}))


def test_runs_of_each_setting_are_counted(cells):
    table = comparison.frame(cells)
    assert comparison.runs_of_each(table, ["strategy", "seed"]) == [2]
    assert comparison.runs_of_each(table[:3], ["strategy", "seed"]) == [1, 2]


def test_labels_name_the_settings():
    result = Result({"strategy": "svd", "lora.rank": 4, "seed": 1}, [], "hash", "run")
    assert result.label == "svd lora.rank=4 seed=1"


def test_the_figure_shows_every_run(pictures, cells, tmp_path):
    comparison.figures(cells, tmp_path / "new", "Two strategies")
    comparison.figures(cells[:1], tmp_path / "one", "Two strategies")
    for name in ("comparison.png", "conditions.png"):
        both, one = imread(tmp_path / "new" / name), imread(tmp_path / "one" / name)
        assert both.shape != one.shape or np.abs(both - one).sum() > 1000
