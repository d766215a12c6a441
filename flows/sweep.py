"""A grid of federated runs: one flow run per cell under one parent, and the comparison of what came of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from flows import environment

environment.prepare()

from prefect import flow, runtime  # noqa: E402 (the environment must be ready first)
from prefect.artifacts import create_markdown_artifact  # noqa: E402

from fedlora import comparison, configfile, home, workers  # noqa: E402
from fedlora.comparison import Cell  # noqa: E402
from fedlora.config import RunConfig, Section  # noqa: E402
from fedlora.errors import ConfigError, FedloraError, RunAborted, did_you_mean  # noqa: E402
from flows import interruption, progress  # noqa: E402
from flows.federated import federated, run_name  # noqa: E402
from flows.presets import PRESETS, SWEEPS  # noqa: E402
from mlflow_tracking import parents  # noqa: E402


class Sweep(Section):
    """What a sweep file holds."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    """Names the sweep's folder and its parent run in MLflow."""
    base: str = "demo"
    """The preset or YAML file that every run starts from."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings for all runs, by dotted key."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Values to combine, by dotted key: every combination is a run."""

    def cells(self) -> list[dict[str, Any]]:
        """Every combination of the grid, the last key varying fastest."""
        keys = list(self.grid)
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class Outcome:
    """A finished sweep: its folder (table and picture), the runs that finished, and why others did not."""

    folder: Path
    finished: list[Cell]
    failed: dict[str, str]
    parent: parents.Parent


def load(source: str, overrides: dict[str, Any] | None = None) -> Sweep:
    """A sweep by name or file; overrides apply to all its runs (an overridden grid key is no longer varied).

    Raises:
        ConfigError: unreadable, an unknown key, an empty or repeated grid value, or a cell that is not valid.
    """
    content = configfile.read_yaml(configfile.find(source, SWEEPS, "sweep"))
    for key in content:
        if key not in Sweep.model_fields:
            raise ConfigError(f"{source}: unknown key '{key}'.{did_you_mean(key, Sweep.model_fields)}")
    try:
        sweep = Sweep.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{source}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    fixed = overrides or {}
    grid = {key: values for key, values in sweep.grid.items() if key not in fixed}
    sweep = sweep.model_copy(update={"set": {**configfile.flatten(sweep.set), **fixed}, "grid": grid})
    _check(sweep)
    return sweep


def _check(sweep: Sweep) -> None:
    for key, values in sweep.grid.items():
        if not values:
            raise ConfigError(f"sweep {sweep.name}: grid.{key} is an empty list, so there is nothing to run")
        if len({json.dumps(value) for value in values}) != len(values):
            raise ConfigError(f"sweep {sweep.name}: grid.{key} has a value twice: {values}")
    for cell in sweep.cells():
        configuration(sweep, cell)


def configuration(sweep: Sweep, cell: dict[str, Any]) -> RunConfig:
    """The configuration of one cell.

    Raises:
        ConfigError: it is not valid.
    """
    return configfile.load(sweep.base, {**sweep.set, **cell}, PRESETS)


@flow(name="sweep")
def run_sweep(sweep: Sweep) -> Outcome:
    """Run every cell of a sweep, one after the other, and compare them; a cell that fails does not stop the rest.

    Args:
        sweep: Its name, base, settings for all, and grid.
    """
    cells = sweep.cells()
    first = configuration(sweep, cells[0])
    told = progress.current()
    folder = home.sweeps() / f"{sweep.name}-{str(runtime.flow_run.id)[:8]}"
    finished: list[Cell] = []
    failed: dict[str, str] = {}
    parent = parents.start(first.tracking, sweep.name, _description(sweep, [], folder))
    with interruption.noted(), parents.closing(parent), workers.open_pool(first.runner):
        for cell in cells:
            config = configuration(sweep, cell)
            label = Cell(cell, folder).label or run_name(config)
            try:
                finished.append(Cell(cell, Path(_run_cell(sweep, cell, config, parent.run))))
            except RunAborted as error:
                failed[label] = str(error)
                told.say(f"{label} failed: {error}")
        if finished:
            _compare(sweep, finished, folder)
            note = _description(sweep, finished, folder)
            parents.publish(parent, folder, note)
            create_markdown_artifact(note, key="sweep-summary")
    if not finished:
        raise FedloraError(f"sweep {sweep.name}: no run finished; first: {next(iter(failed.values()))}")
    return Outcome(folder, finished, failed, parent)


def _run_cell(sweep: Sweep, cell: dict[str, Any], config: RunConfig, parent: str) -> str:
    named = federated.with_options(flow_run_name=run_name(config))
    return str(named(preset=sweep.base, overrides={**sweep.set, **cell}, mlflow_parent=parent))


def _compare(sweep: Sweep, finished: Sequence[Cell], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    comparison.frame(finished).to_csv(folder / "comparison.csv", index=False)
    comparison.figures(finished, folder, sweep.name)


def _description(sweep: Sweep, finished: Sequence[Cell], folder: Path) -> str:
    """The sweep in Markdown: a leaderboard once runs have finished."""
    head = (
        f"## Sweep {sweep.name}\n\nbase `{sweep.base}`, grid `{json.dumps(sweep.grid)}`, set `{json.dumps(sweep.set)}`"
    )
    if not finished:
        return head
    means, _ = comparison.over_seeds(comparison.frame(finished), list(sweep.grid))
    ranked = means.sort_values("accuracy", ascending=False)
    titles = [*ranked.index.names, *comparison.COLUMNS]
    rows = [f"| {' | '.join(map(str, titles))} |", "|---" * len(titles) + "|"]
    for index, values in zip(ranked.index, ranked.itertuples(index=False), strict=True):
        names = index if isinstance(index, tuple) else (index,)
        rows.append(f"| {' | '.join([*map(str, names), *(f'{value:.4g}' for value in values)])} |")
    return f"{head}\n\n" + "\n".join(rows) + f"\n\nTable and picture: `{folder}`"
