"""Finished runs side by side: a row per run, averaged over seeds, and the pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fedlora import metrics, objective
from fedlora.config import RunConfig
from fedlora.metrics import RoundRecord
from fedlora.objective import Score
from fedlora.report import plots
from fedlora.run import rounds
from fedlora.run.runfolder import RunFolder
from fedlora.sweep.plan import label

_BESIDE = ("gap", "ρ first", "ρ last", "ρ floor", "clients used", "MB", "seconds")
_USUAL = objective.scores_of(RunConfig())
COLUMNS = (*(score.title for score in _USUAL), *_BESIDE)
_DIGITS = {"clients used": 1, "MB": 1, "seconds": 0}
"""Decimals of a column; of the others three."""

DETAILS = {
    "mean R": metrics.ABO_R,
    "mean P": metrics.ABO_P,
    "mean Q": metrics.ABO_Q,
    "mean dispersion": metrics.ABO_DISPERSION,
}
"""Further columns of the CSV file: means over rounds, and the metric of which they are."""


@dataclass(frozen=True)
class Result:
    """One finished run of a comparison: what distinguishes it (dotted key to value), its rounds, the hash of its
    partition, and its run in MLflow or its folder."""

    settings: dict[str, Any]
    records: list[RoundRecord]
    partition: str
    run: str
    scores: Sequence[Score] = field(default=_USUAL)
    """What it is judged by: the score that decides, then others."""

    @classmethod
    def of_folder(cls, settings: dict[str, Any], folder: Path) -> Result:
        """The result in a run folder.

        Raises:
            RunFolderError: the folder is not whole.
        """
        found = RunFolder(folder)
        scores = found.objective.scores_of(found.config)
        return cls(settings, rounds.records(found), found.need_json("partition.json")["hash"], str(folder), scores)

    @property
    def label(self) -> str:
        return label(self.settings)


def columns(results: Sequence[Result]) -> tuple[str, ...]:
    """What a table of these runs shows: their scores, and what every run has."""
    return (*(score.title for score in results[0].scores), *_BESIDE) if results else COLUMNS


def row(found: Sequence[RoundRecord], scores: Sequence[Score] = _USUAL) -> dict[str, float | None]:
    """A run's results: final `scores`, the deciding one first, ρ in the first and last round and its last floor, mean
    number of clients whose updates a round used, megabytes (10⁶ bytes) sent both ways, seconds of wall time in
    rounds of training; and the means over rounds of R, P, Q and the dispersion, the observable sides of the conditions
    of arXiv 2508.01348.
    What was not measured is None, as ρ is where a round used one client's update."""
    trained = [record.metrics for record in found[1:]]
    used = [values[metrics.CLIENTS_COMPLETED] for values in trained if metrics.CLIENTS_COMPLETED in values]
    first, last = trained[0], trained[-1]
    return {
        **{score.title: last.get(f"global/{score.name}") for score in scores},
        "gap": last.get(f"gap/{scores[0].name}"),
        "ρ first": first.get(metrics.RHO_MODEL),
        "ρ last": last.get(metrics.RHO_MODEL),
        "ρ floor": last.get(metrics.RHO_FLOOR),
        "clients used": sum(used) / len(used) if used else None,
        "MB": last[metrics.BYTES_TOTAL] / 1e6,
        "seconds": metrics.seconds(found),
        **{name: sum(values[key] for values in trained) / len(trained) for name, key in DETAILS.items()},
    }


def frame(results: Iterable[Result]) -> pd.DataFrame:
    """A row per run: its settings, its results, its partition's hash, its run in MLflow or its folder."""
    return pd.DataFrame(
        [
            {**result.settings, **row(result.records, result.scores), "partition": result.partition, "run": result.run}
            for result in results
        ]
    )


def over_seeds(
    table: pd.DataFrame, settings: Sequence[str], shown: Sequence[str] = COLUMNS
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean and standard deviation of the results over seeds, for each combination of the other settings, in the
    order in which they first appear; settings become the index, and `shown` are the columns."""
    grouped = _by_setting(table, settings)[list(shown)]
    return grouped.mean(), grouped.std()


def cell(column: str, mean: float | None, spread: float) -> str:
    """What a table shows: `mean ± spread` with the column's decimals, the mean where no spread is known, or a dash."""
    digits = _DIGITS.get(column, 3)
    if mean is None or math.isnan(mean):
        return "–"
    text = f"{mean:.{digits}f}"
    return text if math.isnan(spread) else f"{text} ± {spread:.{digits}f}"


def runs_of_each(table: pd.DataFrame, settings: Sequence[str]) -> list[int]:
    """How many runs a combination of settings has: every number that occurs, rising."""
    return sorted(set(_by_setting(table, settings).size()))


def _by_setting(table: pd.DataFrame, settings: Sequence[str]) -> Any:
    keys = [key for key in settings if key != "seed"]
    if not keys:
        table, keys = table.assign(run="all seeds"), ["run"]
    return table.groupby(keys, sort=False, dropna=False)


def same_partition(table: pd.DataFrame) -> bool:
    """Whether all runs of one seed had the same partition, so that only the other settings varied; where the dealing
    itself is varied, within each way of dealing."""
    return all(hashes.nunique() == 1 for hashes in _by_dealing(table))


def shared(table: pd.DataFrame) -> str:
    """A sentence on what the runs of a table have in common, by the hashes of their partitions."""
    hashes = sorted(set(table["partition"]))
    if len(table) == 1:
        return f"partition hash {hashes[0]}"
    if len(hashes) == 1:
        return f"All {len(table)} runs share one partition (hash {hashes[0]}): only the settings above vary."
    within = " and ".join(_dealing(table))
    if not same_partition(table):
        whose = f"Runs of the same {within}" if within else "The runs"
        return f"{whose} differ in their partition, so the rows differ in more than their settings."
    named = f"{len(hashes)} partitions (hashes {', '.join(hashes)})"
    if all(len(runs) == 1 for runs in _by_dealing(table)):
        return f"{named}: each run has one of its own, by its {within}."
    return f"{named}, one for each {within}: runs that share it differ in the other settings only."


def _dealing(table: pd.DataFrame) -> list[str]:
    """The settings of a table by which data is dealt."""
    names = (str(key) for key in table)
    return [key for key in names if key in ("seed", "clients") or key.startswith(("partition.", "data."))]


def _by_dealing(table: pd.DataFrame) -> list[Any]:
    """The partitions of the runs that were dealt alike, group by group."""
    keys = _dealing(table)
    return [hashes for _, hashes in table.groupby(keys, dropna=False)["partition"]] if keys else [table["partition"]]


def figures(results: Sequence[Result], folder: Path, title: str) -> None:
    """`comparison.png` (score and ρ against rounds) and `conditions.png` (R, and P + Q), a line per run in its
    strategy's colour where that tells runs apart."""
    runs = {result.label: result.records for result in results}
    colours = {result.label: plots.colour(str(result.settings.get("strategy", result.label))) for result in results}
    legend = {result.label: label(_without_seed(result.settings)) or "all seeds" for result in results}
    plots.rounds_figure(runs, folder / "comparison.png", results[0].scores[0], colours, title, legend)
    plots.conditions_figure(runs, folder / "conditions.png", colours, legend)


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "seed"}
