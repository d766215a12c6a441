"""A sweep's state on disk: which runs it holds, how far each is, and where it is tracked.

sweep.json  comparison.csv  comparison.png  conditions.png  report/
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fedlora.errors import saving
from fedlora.files.atomic import write_json
from fedlora.sweep.plan import Sweep

Status = Literal["waiting", "finished", "failed", "skipped"]
STATE = "sweep.json"
_STAMP = re.compile(r"-\d{8}-\d{6}(-\d+)?$")
"""The end of an execution's name: when it began, UTC."""


@dataclass(frozen=True)
class CellState:
    """How far a run of a sweep is; `run` is its run in MLflow once it has finished."""

    label: str
    settings: dict[str, Any]
    digest: str | None
    status: Status
    reason: str | None = None
    run: str | None = None
    refused: bool = False
    """It failed because it could not begin, which is looked at anew every time."""


@dataclass
class SweepFolder:
    """One execution of a sweep: interrupted, it is continued in the same folder."""

    path: Path
    flow_runs: list[str] = field(default_factory=list)
    """Prefect flow runs that worked on it."""
    parent: dict[str, str] | None = None
    """Its run in MLflow: uri, experiment, run."""
    cells: list[CellState] = field(default_factory=list)
    champion: str | None = None
    """What became of its best adapter in the model registry, in words."""

    @property
    def instance(self) -> str:
        """Its name among all executions, like `demo-1a2b3c4d-20261121-101500`."""
        return self.path.name

    @classmethod
    def choose(cls, root: Path, sweep: Sweep, fresh: bool = False, flow_run: str = "") -> SweepFolder:
        """The latest execution of this sweep under `root`, or a new one.

        Args:
            root: where sweeps are.
            sweep: the sweep; an execution is its own if base and common settings are the same.
            fresh: begin anew, unless `flow_run` itself has begun before (a retry).
            flow_run: the Prefect flow run that asks.

        Raises:
            RunFolderError: the folder cannot be written.
        """
        known = cls._known(root, sweep)
        wanted = [folder for folder in known if not fresh or (flow_run and flow_run in folder.flow_runs)]
        if wanted:
            return wanted[-1]
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        names = (
            f"{sweep.name}-{sweep.identity}-{stamp}{'' if count == 1 else f'-{count}'}" for count in range(1, 1000)
        )
        with saving(root, "another $FEDLORA_HOME"):
            root.mkdir(parents=True, exist_ok=True)
            path = next(root / name for name in names if not (root / name).exists())
            path.mkdir()
        return cls(path)

    @classmethod
    def latest(cls, root: Path, sweep: Sweep) -> SweepFolder | None:
        """The latest execution of this sweep, if there was one."""
        known = cls._known(root, sweep)
        return known[-1] if known else None

    def before(self) -> SweepFolder | None:
        """The last execution before this one, of the same name, base and common settings, that came to its end with a
        finished run; None where there was none."""
        plan = _STAMP.sub("", self.instance)
        names = (path.name for path in self.path.parent.glob(f"{plan}-*"))
        earlier = sorted(name for name in names if _STAMP.sub("", name) == plan and name < self.instance)
        found = (self.read(self.path.with_name(name)) for name in reversed(earlier))
        return next((each for each in found if each and each.having("finished") and not each.having("waiting")), None)

    @classmethod
    def _known(cls, root: Path, sweep: Sweep) -> list[SweepFolder]:
        found = map(cls.read, sorted(root.glob(f"{sweep.name}-{sweep.identity}-*")))
        return [folder for folder in found if folder]

    @classmethod
    def read(cls, path: Path) -> SweepFolder | None:
        """The state in a folder, or None where there is none that can be read."""
        try:
            content = json.loads((path / STATE).read_text("utf-8"))
            cells = [CellState(**cell) for cell in content["cells"]]
            return cls(path, list(content["flow_runs"]), content["parent"], cells, content["champion"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def copy(self) -> SweepFolder:
        """The same state, to try changes on."""
        return replace(self, flow_runs=list(self.flow_runs), cells=list(self.cells))

    def begin(self, sweep: Sweep, flow_run: str, forget_failures: bool) -> None:
        """Take up the runs of `sweep`; what is known of those that were here before stays."""
        known = {
            cell.digest: cell
            for cell in self.cells
            if not (cell.status == "failed" and (forget_failures or cell.refused))
        }
        fresh = [CellState(cell.label, cell.settings, cell.digest, "waiting") for cell in sweep.cells]
        self.cells = [
            replace(cell, status=old.status, reason=old.reason, run=old.run)
            if (old := known.get(cell.digest))
            else cell
            for cell in fresh
        ]
        self.cells += [CellState(left.label, left.settings, None, "skipped", left.reason) for left in sweep.skipped]
        if flow_run and flow_run not in self.flow_runs:
            self.flow_runs.append(flow_run)

    def mark(self, digest: str, status: Status, reason: str | None = None, run: str | None = None) -> None:
        """Note how a run stands."""
        self.cells = [
            replace(cell, status=status, reason=reason, run=run) if cell.digest == digest else cell
            for cell in self.cells
        ]

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Note which runs cannot begin, and why, by their digest."""
        self.cells = [
            replace(cell, status="failed", reason=reason, refused=True)
            if cell.status == "waiting" and (reason := reasons.get(str(cell.digest)))
            else cell
            for cell in self.cells
        ]

    def having(self, status: Status) -> list[CellState]:
        """The runs of a status, in the sweep's order."""
        return [cell for cell in self.cells if cell.status == status]

    def save(self, sweep: Sweep) -> None:
        """Write `sweep.json`, whole or not at all."""
        content = {
            "name": sweep.name,
            "instance": self.instance,
            "base": sweep.base,
            "set": sweep.common,
            "grid": sweep.grid,
            "varied": sweep.varied,
            "compare": asdict(sweep.roles),
            "flow_runs": self.flow_runs,
            "parent": self.parent,
            "champion": self.champion,
            "cells": [asdict(cell) for cell in self.cells],
        }
        with saving(self.path, "another $FEDLORA_HOME"):
            write_json(self.path / STATE, content)
