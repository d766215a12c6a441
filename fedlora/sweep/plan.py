"""What a sweep file says: which runs, which of them are left out and why. Pure: nothing is run here."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fedlora.config import configfile
from fedlora.config.run import NEUTRAL, RunConfig
from fedlora.errors import ConfigError, StrategyRefusal, did_you_mean
from fedlora.files.limits import clean, short
from fedlora.report.roles import Roles
from fedlora.run import preflight
from fedlora.sections import Section

Settings = dict[str, Any]

MOST_RUNS = 10_000
"""Runs of one sweep: a grid is combined in memory before any of them starts."""
_REASON = "reason"
"""The key of a `skip` entry that is no condition."""


class Compare(Section):
    """What the varied settings are, where it is not what `fedlora.report.roles` takes them for."""

    choices: list[str] = Field(default_factory=list)
    """Keys (or sections, like `model`) that are chosen among."""
    conditions: list[str] = Field(default_factory=list)
    """Keys (or sections) that the world decides: choices are compared within each of their values."""


class SweepFile(Section):
    """The keys of a sweep file."""

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    """Names the sweep's folder, its parent run in MLflow and the registered model of its best adapter."""
    base: str = "demo"
    """The preset or YAML file that every run starts from."""
    set: Settings = Field(default_factory=dict)
    """Settings for all runs, by dotted key."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Values to combine, by dotted key: every combination is a run."""
    cells: list[Settings] = Field(default_factory=list)
    """Further runs, each as the settings in which it differs from `base` and `set`."""
    skip: list[Settings] = Field(default_factory=list)
    """Runs to leave out: each entry is a condition, dotted keys with a value or a list of values, all of which must
    hold; its `reason` is shown."""
    compare: Compare = Field(default_factory=Compare)
    """Which settings are choices and which are conditions, where the default is not what is meant."""
    champion: bool = True
    """Whether the best adapter is registered as a model version in MLflow."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    settings: Settings
    """Value of every key that tells this run from the others."""
    changes: Settings
    """Everything on top of the base, by dotted key."""
    config: RunConfig
    short: str = ""
    """The run in few words, like `svd alpha=0.1 s1` (`Roles.short`)."""

    @property
    def label(self) -> str:
        """The run in words, like `svd seed=1`."""
        return label(self.settings) or self.config.name or f"{self.config.strategy} seed={self.config.seed}"

    @property
    def name(self) -> str:
        """What the run is called: as configured, otherwise what tells it from the others, in few words."""
        return self.config.name or self.short or self.label

    @property
    def digest(self) -> str:
        """Hash of what decides the run's numbers."""
        return self.config.digest()


@dataclass(frozen=True)
class Skipped:
    """A run that was left out, and why."""

    settings: Settings
    reason: str

    @property
    def label(self) -> str:
        return label(self.settings)


@dataclass(frozen=True)
class Sweep:
    """A sweep, resolved: its runs, each with a checked configuration."""

    name: str
    base: str
    common: Settings
    """Settings of all runs."""
    grid: dict[str, list[Any]]
    varied: list[str]
    """The keys in which the runs differ."""
    cells: list[Cell]
    skipped: list[Skipped]
    identity: str
    """Hash of name, base and common settings: sweeps that differ in their grid only go on in one place."""
    champion: bool = True
    roles: Roles = field(default_factory=Roles)
    """Which of the varied keys are choices; the others are conditions."""

    @property
    def world(self) -> list[str]:
        """The keys that tell conditions apart."""
        return [key for key in self.varied if self.roles.is_condition(key) and len(_values(key, self.cells)) > 1]


def label(settings: Mapping[str, Any]) -> str:
    """Settings in words: `svd seed=1 lora.rank=4`."""
    return " ".join(str(value) if key == "strategy" else f"{key}={value}" for key, value in settings.items())


def load(source: str, overrides: Settings | None, presets: Path, sweeps: Path) -> Sweep:
    """A sweep by name or file; overrides apply to all its runs (an overridden grid key is no longer varied).

    Raises:
        ConfigError: unreadable, an unknown key, nothing to run, a run given twice, or a run that is not valid.
    """
    path = configfile.find(source, sweeps, "sweep")
    content = configfile.read_yaml(path)
    for key in content:
        if key not in SweepFile.model_fields:
            raise ConfigError(f"{source}: unknown key '{key}'.{did_you_mean(key, SweepFile.model_fields)}")
    try:
        file = SweepFile.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{source}: {clean('.'.join(map(str, first['loc'])))}: {first['msg']}") from None
    try:
        file = _beside(file, path)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    _check_lists(source, file)
    _check_roles(source, file.compare)
    return _resolve(source, file, path.parent, overrides or {}, presets)


def _beside(file: SweepFile, path: Path) -> SweepFile:
    """The sweep with dotted keys, and paths as seen from its own folder; a base is looked for here first.

    Cells keep the paths as they are written, by which they are called.
    """
    cells = [configfile.flatten(each) for each in file.cells]
    common, *conditions = (
        configfile.absolute_paths(configfile.flatten(each), path.parent) for each in (file.set, *file.skip)
    )
    changes = {"base": _base(file.base, path), "set": common, "skip": conditions, "cells": cells}
    return file.model_copy(update=changes)


def _base(base: str, sweep: Path) -> str:
    if not base.endswith(configfile.YAML):
        return base
    try:
        here = Path(base).expanduser()
        return str((here if here.is_file() else sweep.parent / here).absolute())
    except (OSError, RuntimeError):  # a name that no file can have, or the home of nobody
        return base


def _check_lists(source: str, file: SweepFile) -> None:
    if not file.grid and not file.cells:
        raise ConfigError(
            f"{source}: there is nothing to run; give a grid (key: [values]) or cells (a list of settings)"
        )
    for key, values in file.grid.items():
        if not values:
            raise ConfigError(f"{source}: grid.{key} is an empty list, so there is nothing to run")
        if len({json.dumps(value, sort_keys=True) for value in values}) != len(values):
            raise ConfigError(f"{source}: grid.{key} has a value twice: {short(values)}")
    runs = math.prod(map(len, file.grid.values())) * bool(file.grid) + len(file.cells)
    if runs > MOST_RUNS:
        raise ConfigError(f"{source}: {runs} runs are too many; at most {MOST_RUNS} make one sweep")
    known = set(configfile.dotted_keys())
    for condition in file.skip:
        if not set(condition) - {_REASON}:
            raise ConfigError(f"{source}: a skip entry without a condition would leave out everything")
        for key in condition:
            if key not in known | {_REASON} and not key.startswith("strategy_options."):
                raise ConfigError(f"{source}: skip: unknown key '{key}'.{did_you_mean(key, known)}")


def _check_roles(source: str, compare: Compare) -> None:
    known = list(configfile.dotted_keys())
    sections = {key.rpartition(".")[0] for key in known} - {""}
    for name, keys in (("choices", compare.choices), ("conditions", compare.conditions)):
        for key in keys:
            if key not in {*known, *sections, "strategy_options"} and not key.startswith("strategy_options."):
                raise ConfigError(f"{source}: compare.{name}: unknown key '{key}'.{did_you_mean(key, known)}")
    for key in compare.choices:
        if key in compare.conditions:
            raise ConfigError(f"{source}: compare: '{key}' is among the choices and the conditions; remove one")


def _check_scores(source: str, cells: Sequence[Cell]) -> None:
    """Refuse runs that no one score compares."""
    tasks = sorted({cell.config.task for cell in cells})
    if len(tasks) > 1:
        raise ConfigError(
            f"{source}: runs of task={' and task='.join(tasks)} in one sweep, which no score compares; make a sweep of "
            "each"
        )
    if tasks != [RunConfig.model_fields["task"].default]:  # of which it is known, without importing torch
        from fedlora import objective

        scores = sorted({objective.score_of(cell.config).title for cell in cells})
        if len(scores) > 1:
            raise ConfigError(
                f"{source}: some runs are judged by {' and others by '.join(scores)}; make a sweep of each"
            )


def _resolve(source: str, file: SweepFile, folder: Path, overrides: Settings, presets: Path) -> Sweep:
    settled = {*overrides, *configfile.unset_by(overrides)}
    grid = {key: values for key, values in file.grid.items() if key not in settled}
    extra = [{k: v for k, v in cell.items() if k not in settled} for cell in file.cells]
    common = configfile.layered(file.set, overrides)
    start = configfile.read_flat(file.base, presets)
    wanted = list(_combinations(grid, bool(file.grid))) + extra
    keys = list(dict.fromkeys(itertools.chain(grid, *extra)))
    cells: list[Cell] = []
    skipped: list[Skipped] = []
    for written in wanted:
        changes = configfile.absolute_paths(written, folder)
        values = configfile.layered(start, common, changes)
        settings = {key: _shown(_value({**values, **written}, key)) for key in keys}
        reason = _left_out(file.skip, values)
        try:
            if reason is None:
                config = configfile.build(values)
                preflight.check_rank(config)
                cells.append(Cell(settings, configfile.layered(common, changes), config))
                continue
        except StrategyRefusal as error:
            reason = str(error)
        except ConfigError as error:
            where = f" (run {clean(label(settings))})" if settings else ""
            raise ConfigError(f"{source}: {error}{where}") from None
        skipped.append(Skipped(settings, reason))
    if not cells:
        every = "its only run is" if len(skipped) == 1 else f"all {len(skipped)} runs are"
        raise ConfigError(f"{source}: {every} left out; the first, because: {skipped[0].reason}")
    _check_twice(source, cells)
    _check_scores(source, cells)
    varied = _telling(keys, cells)
    roles = Roles(tuple(file.compare.choices), tuple(file.compare.conditions))
    cells = [_told_apart(cell, varied, roles) for cell in cells]
    fixed = {key: value for key, value in {**start, **common}.items() if key not in (*keys, *NEUTRAL)}
    return Sweep(
        name=file.name,
        base=file.base,
        common=common,
        grid=grid,
        varied=varied,
        cells=cells,
        skipped=skipped,
        identity=_hash([file.name, fixed]),
        champion=file.champion,
        roles=roles,
    )


def _combinations(grid: Mapping[str, Sequence[Any]], any_grid: bool) -> Iterator[Settings]:
    """Every combination, the last key varying fastest; one empty one where every key of a grid was overridden."""
    if any_grid:
        for values in itertools.product(*grid.values()):
            yield dict(zip(grid, values, strict=True))


def _check_twice(source: str, cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.digest, cell)
        if other is not cell:
            same = other.label == cell.label
            what = f"'{cell.label}' is" if same else f"'{other.label}' and '{cell.label}' are"
            raise ConfigError(
                f"{source}: {what} the same run twice: every setting that decides the numbers is equal; remove one"
            )


def _telling(keys: Sequence[str], cells: Sequence[Cell]) -> list[str]:
    """The keys that tell runs apart, and the strategy; all of them where there is one run only."""
    if len(cells) == 1:
        return list(keys)
    return [key for key in keys if key == "strategy" or len(_values(key, cells)) > 1]


def _values(key: str, cells: Sequence[Cell]) -> set[str]:
    return {json.dumps(cell.settings[key]) for cell in cells}


def _told_apart(cell: Cell, varied: Sequence[str], roles: Roles) -> Cell:
    """The same with no settings but those that vary, and its name from them."""
    settings = {key: cell.settings[key] for key in varied}
    named = settings if "strategy" in settings else {"strategy": cell.config.strategy, **settings}
    return replace(cell, settings=settings, short=roles.short(named) if settings else "")


def _value(values: Settings, key: str) -> Any:
    """What a key is set to, or its default."""
    return values[key] if key in values else configfile.default_of(key)


def _left_out(conditions: Sequence[Settings], values: Settings) -> str | None:
    """The reason of the first condition that holds for a run, or None."""
    for condition in conditions:
        tests = {key: allowed for key, allowed in condition.items() if key != _REASON}
        if all(_matches(_value(values, key), allowed) for key, allowed in tests.items()):
            return str(condition.get(_REASON) or f"left out by the sweep: {label(tests)}")
    return None


def _matches(value: Any, allowed: Any) -> bool:
    return value == allowed or (isinstance(allowed, list) and value in allowed)


def _shown(value: Any) -> Any:
    """A value as it stands in tables: what is not a plain value becomes text (`null` for none)."""
    return value if isinstance(value, str | int | float | bool) else json.dumps(value)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]
