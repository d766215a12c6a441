"""What a report shows, computed from its frames: results of runs, costs, correlations, what runs share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedlora import metrics
from fedlora.errors import counted
from fedlora.report import frames, statistics
from fedlora.report.frames import Comparison, Setting
from fedlora.report.statistics import Correlation, Interval

_BESIDE = (
    *("gap", "worst_client", "p10_client", "rho_first", "rho_mean", "rho_last", "rho_floor"),
    *("clients_used", "megabytes", "seconds"),
)
"""A run's results beside its scores after the last round: local minus global score; the worst client's local score and
the worst tenth's (the 10th percentile of all, or the 90th where lower is better); ρ in round one, its mean
over rounds and in the last round, with that round's floor (blank where one client took part); mean number of clients
whose updates a round used; 10⁶ bytes both ways; seconds of wall time in rounds of training."""

UNBOUNDED = (-math.inf, math.inf)
_NOT_NEGATIVE = ("rho_first", "rho_mean", "rho_last", "rho_floor", "megabytes", "seconds")

COSTS = {
    **metrics.BYTES,
    "train": metrics.TIME_TRAIN,
    "read": metrics.TIME_READ,
    "aggregate": metrics.TIME_AGGREGATE,
    "divergence": metrics.TIME_DIVERGENCE,
    "evaluate": metrics.TIME_EVALUATE,
    "round": metrics.TIME_ROUND,
}
"""Metrics that are summed over a run's rounds: bytes by kind, seconds by phase."""


def names(comparison: Comparison) -> tuple[str, ...]:
    """What the results of a run are called: its scores, the deciding one first, and the others."""
    return (*(score.name for score in comparison.scores), *_BESIDE)


def bounds(comparison: Comparison) -> dict[str, tuple[float, float]]:
    """What each result cannot leave, and so its interval neither."""
    criterion = comparison.criterion
    ends, width = (criterion.low, criterion.high), criterion.high - criterion.low
    return {
        **dict.fromkeys(names(comparison), UNBOUNDED),
        **dict.fromkeys(_NOT_NEGATIVE, (0.0, math.inf)),
        **{score.name: (score.low, score.high) for score in comparison.scores},
        **dict.fromkeys(("worst_client", "p10_client"), ends),
        "gap": (-width, width),
    }


def results(comparison: Comparison) -> pd.DataFrame:
    """A row per run (index: run id) with the results of `names`; what was not measured is NaN."""
    runs = comparison.runs.set_index("run_id")
    found = pd.DataFrame(index=runs.index)
    for name in (score.name for score in comparison.scores):
        found[name] = runs.get(f"{metrics.FINAL}{name}", math.nan)
    found["gap"] = runs.get(metrics.FINAL_GAP, math.nan)
    trained = comparison.rounds[comparison.rounds["round"] > 0].sort_values("round")
    by_run = trained.groupby("run_id")
    # Not first() and last(): these skip what is blank, and would show another round's.
    first, last = (rows.set_index("run_id") for rows in (by_run.head(1), by_run.tail(1)))
    local = f"{metrics.LOCAL}{comparison.criterion.name}"
    found["worst_client"] = last.get(f"{local}{metrics.WORST}", math.nan)
    found["p10_client"] = last.get(f"{local}{metrics.TENTH}", math.nan)
    rho, used = metrics.RHO_MODEL, metrics.CLIENTS_COMPLETED
    found["rho_first"] = first.get(rho, math.nan)
    found["rho_mean"] = by_run[rho].mean() if rho in trained else math.nan
    found["rho_last"] = last.get(rho, math.nan)
    found["rho_floor"] = last.get(metrics.RHO_FLOOR, math.nan)
    found["clients_used"] = by_run[used].mean() if used in trained else math.nan
    found["megabytes"] = last.get(metrics.BYTES_TOTAL, math.nan) / 1e6
    found["seconds"] = sums(comparison.rounds, [metrics.TIME_ROUND]).get(metrics.TIME_ROUND, math.nan)
    return found.astype(float)


def sums(rounds: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Metrics summed over each run's rounds of training (index: run id); a column for each that was measured. Scoring
    before training is not counted: a run may have it from another.

    The seconds of a resumed round are those of what was left of it: it counts as the mean of the run's other rounds of
    training, and where there is none the sum is not known.
    """
    known = [name for name in names if name in rounds]
    rounds = rounds[rounds["round"] > 0]
    total = rounds.groupby("run_id")[known].sum(min_count=1)
    if metrics.TIME_RESUMED not in rounds:
        return total
    again = rounds[metrics.TIME_RESUMED] > 0
    times = again.groupby(rounds["run_id"]).sum()
    for name in (name for name in metrics.PARTIAL if name in known):
        whole = rounds[~again].groupby("run_id")[name].agg(["sum", "mean"]).reindex(times.index)
        total[name] = total[name].where(times == 0, whole["sum"] + times * whole["mean"])
    return total


def spent(comparison: Comparison) -> pd.DataFrame:
    """What each run cost (index: run id), by the names of `costs.COSTS`; NaN where not measured."""
    found = results(comparison)[["megabytes", "seconds"]].copy()
    server = sums(comparison.rounds, [metrics.TIME_READ, metrics.TIME_AGGREGATE])
    found["server_seconds"] = server.sum(axis=1, min_count=1) if len(server.columns) else math.nan
    by_run = comparison.rounds.groupby("run_id")
    for name, metric in (("client_memory", metrics.MEMORY_CLIENT), ("server_memory", metrics.MEMORY_SERVER)):
        found[name] = by_run[metric].max() / 1e6 if metric in comparison.rounds else math.nan
    return found.astype(float)


def of_runs(values: pd.DataFrame, setting: Setting, result: str) -> list[float]:
    """A result of a setting's runs, in the order of its seeds."""
    return [float(value) for value in values.loc[list(setting.seeds.values()), result]]


def over_seeds(values: pd.DataFrame, setting: Setting, result: str, ends: tuple[float, float]) -> Interval:
    """A result's mean over a setting's seeds, with its interval within what it cannot leave (`bounds`)."""
    return statistics.interval(of_runs(values, setting, result), bounds=ends)


def client_scores(comparison: Comparison) -> dict[str, list[float]]:
    """By run, the score of each client's own model on its own test examples in the run's last round."""
    clients, name = comparison.clients, comparison.criterion.name
    if clients.empty or name not in clients:
        return {}
    last = clients[clients["round"] == clients.groupby("run_id")["round"].transform("max")]
    return {str(run): rows.astype(float).dropna().tolist() for run, rows in last.groupby("run_id")[name]}


@dataclass(frozen=True)
class Related:
    """How ρ goes with the score: which ρ, over which points."""

    rho: str
    points: str
    found: Correlation


_WHICH_RHO = {"rho_first": "ρ in round 1", "rho_mean": "mean ρ over rounds", "rho_last": "ρ in the last round"}


def correlations(comparison: Comparison) -> list[Related]:
    """ρ against the final score: over settings (means over their seeds), and over runs.

    Where some have a ρ of 1 or more (an error as large as what should have been sent), also over the others alone.
    """
    values = results(comparison)
    means = pd.DataFrame(
        [values.loc[list(setting.seeds.values())].mean() for setting in frames.settings(comparison.runs)]
    )
    several = len(values) > len(means)
    tables = [("settings, means over seeds" if several else "settings", means)]
    tables += [("runs", values)] if several else []
    found, score = [], comparison.criterion.name
    for points, table in tables:
        for name, words in _WHICH_RHO.items():
            within = table[~(table[name] >= 1)]
            found.append(Related(words, points, _correlated(table, name, score)))
            if len(within) < len(table):
                found.append(Related(f"{words}, where below 1", points, _correlated(within, name, score)))
    return found


def _correlated(table: pd.DataFrame, name: str, score: str) -> Correlation:
    return statistics.correlation(table[name].tolist(), table[score].tolist())


def costs(comparison: Comparison) -> list[tuple[Setting, dict[str, float]]]:
    """Per setting, the sums over a run's rounds of `COSTS` (bytes, seconds), means over seeds."""
    total = sums(comparison.rounds, list(COSTS.values()))
    return [
        (
            setting,
            {
                name: float(total.loc[list(setting.seeds.values()), metric].mean()) if metric in total else math.nan
                for name, metric in COSTS.items()
            },
        )
        for setting in frames.settings(comparison.runs)
    ]


@dataclass(frozen=True)
class Sharing:
    """Whether only the settings vary: one partition and data set per seed, the same seeds for all."""

    partition: bool
    partition_words: str
    seeds: bool
    seeds_words: str


def sharing(comparison: Comparison) -> Sharing:
    """Check by hash that runs of one seed share one partition, and by number that settings share their seeds."""
    return Sharing(*_partition_sharing(comparison.runs), *_seed_sharing(frames.settings(comparison.runs)))


def _partition_sharing(runs: pd.DataFrame) -> tuple[bool, str]:
    known = runs["partition"].map(lambda value: bool(value) and not frames.is_missing(value))
    if not known.all():
        return (
            False,
            f"{int((~known).sum())} of {counted(len(runs), 'run')} have no partition hash, so that this cannot be "
            "checked.",
        )
    if len(runs) == 1:
        return True, "One run: there is nothing to share."
    keys = frames.partition_keys(frames.varied(runs))
    groups = runs.fillna({key: "" for key in keys if runs[key].dtype == object}).groupby(["seed", *keys], dropna=False)
    split = [name for name, group in groups if group["partition"].nunique() > 1]
    within = f" and value of {', '.join(keys)}" if keys else ""
    if not split:
        return True, f"All runs of one seed{within} have the same partition (equal hashes): only the settings vary."
    words = "; ".join(frames.words(dict(zip(["seed", *keys], name, strict=True))) for name in split[:5])
    return False, f"Runs differ in their partition within {words}: such rows differ in more than their settings."


def _seed_sharing(found: Sequence[Setting]) -> tuple[bool, str]:
    union = sorted({seed for setting in found for seed in setting.seeds}, key=_order)
    listed = ", ".join(frames.plain(seed) for seed in union)
    lacking = [setting for setting in found if len(setting.seeds) < len(union)]
    if not lacking:
        return True, f"Every setting has the same seed{'s' if len(union) > 1 else ''}: {listed}."
    words = "; ".join(
        f"{setting.label} lacks {', '.join(frames.plain(seed) for seed in union if seed not in setting.seeds)}"
        for setting in lacking[:10]
    )
    more = f"; and {len(lacking) - 10} more" if len(lacking) > 10 else ""
    return (
        False,
        f"Seeds: {listed}, but {words}{more}. Means are over the seeds there are; differences over common ones.",
    )


def _order(seed: Any) -> tuple[int, float, str]:
    return (0, float(seed), "") if isinstance(seed, int | float) else (1, 0.0, str(seed))
