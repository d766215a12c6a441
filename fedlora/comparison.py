"""Finished runs side by side: a row per run, averaged over seeds, and the pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from fedlora import metrics, plots, rounds
from fedlora.runfolder import RunFolder

COLUMNS = ("accuracy", "macro-F1", "gap", "ρ first", "ρ last", "ρ floor", "MB", "seconds")


DETAILS = {
    "mean R": metrics.ABO_R,
    "mean P": metrics.ABO_P,
    "mean Q": metrics.ABO_Q,
    "mean dispersion": metrics.ABO_DISPERSION,
}
"""Further columns of the CSV file: means over rounds, and the metric of which they are."""


@dataclass(frozen=True)
class Cell:
    """One finished run of a comparison: what distinguishes it (dotted key to value) and its folder."""

    settings: dict[str, Any]
    folder: Path

    @property
    def label(self) -> str:
        return " ".join(str(v) if key == "strategy" else f"{key}={v}" for key, v in self.settings.items())


def row(folder: Path) -> dict[str, float | None]:
    """A run's results: final scores, ρ in the first and last round and its last floor, megabytes (10⁶ bytes) sent both
    ways, seconds of wall time in rounds; and the means over rounds of R, P, Q and the dispersion, the observable sides
    of the conditions of arXiv 2508.01348. What was not measured is None."""
    found = rounds.records(RunFolder(folder))
    trained = [record.metrics for record in found[1:]]
    first, last = trained[0], trained[-1]
    return {
        "accuracy": last.get(metrics.GLOBAL_ACCURACY),
        "macro-F1": last.get(metrics.GLOBAL_MACRO_F1),
        "gap": last.get(metrics.GAP_ACCURACY),
        "ρ first": first[metrics.RHO_MODEL],
        "ρ last": last[metrics.RHO_MODEL],
        "ρ floor": last[metrics.RHO_FLOOR],
        "MB": last[metrics.BYTES_TOTAL] / 1e6,
        "seconds": sum(record.metrics[metrics.TIME_ROUND] for record in found),
        **{name: sum(values[key] for values in trained) / len(trained) for name, key in DETAILS.items()},
    }


def frame(cells: Iterable[Cell]) -> pd.DataFrame:
    """A row per run: its settings, its results, its partition's hash and its folder."""
    return pd.DataFrame(
        [
            {
                **cell.settings,
                **row(cell.folder),
                "partition": RunFolder(cell.folder).need_json("partition.json")["hash"],
                "folder": str(cell.folder),
            }
            for cell in cells
        ]
    )


def over_seeds(table: pd.DataFrame, settings: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean and standard deviation of the results over seeds, for each combination of the other settings, in the
    order in which they first appear; settings become the index."""
    keys = [key for key in settings if key != "seed"]
    if not keys:
        table, keys = table.assign(run="all seeds"), ["run"]
    grouped = table.groupby(keys, sort=False, dropna=False)[list(COLUMNS)]
    return grouped.mean(), grouped.std()


def same_partition(table: pd.DataFrame) -> bool:
    """Whether all runs of one seed had the same partition, so that only the other settings varied."""
    groups = table.groupby("seed")["partition"] if "seed" in table else [(None, table["partition"])]
    return all(hashes.nunique() == 1 for _, hashes in groups)


def figures(cells: Sequence[Cell], folder: Path, title: str) -> None:
    """`comparison.png` (accuracy and ρ against rounds) and `conditions.png` (R, and P + Q), a line per run in its
    strategy's colour where that tells runs apart."""
    runs = {cell.label: rounds.records(RunFolder(cell.folder)) for cell in cells}
    colours = {cell.label: plots.colour(str(cell.settings.get("strategy", cell.label))) for cell in cells}
    legend = {cell.label: Cell(_without_seed(cell.settings), cell.folder).label or "all seeds" for cell in cells}
    plots.rounds_figure(runs, folder / "comparison.png", colours, title, legend)
    plots.conditions_figure(runs, folder / "conditions.png", colours, legend)


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "seed"}
