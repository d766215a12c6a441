"""Who can run the work, how each is started, and where it leaves what it did."""

from __future__ import annotations

import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo import tasks
from safetensors.torch import load_file
from torch import Tensor

from fedlora.run import rounds
from fedlora.run.runfolder import RunFolder

from . import measured
from .measured import Cost

BENCHMARKS = Path(__file__).resolve().parents[1]
ENVIRONMENTS = BENCHMARKS.parent / ".venv/peers"
PROCESSES = 2
_ALONE = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(BENCHMARKS)}


@dataclass(frozen=True)
class Done:
    """One execution."""

    cost: Cost
    adapter: Mapping[str, Tensor]
    """Of the server, after round one."""
    packages: Mapping[str, str]


class Contestant(ABC):
    """Something that runs a workload in processes of its own."""

    @abstractmethod
    def execute(self, folder: Path, work: Path, changes: Mapping[str, Any]) -> Done:
        """Run a workload.

        Args:
            folder: new, for whatever it writes.
            work: the exported work.
            changes: of the preset `demo`: the workload.
        """


@dataclass(frozen=True)
class Script(Contestant):
    """A module of this package that reads the exported work, in an environment of its own or in this one."""

    command: Sequence[str]
    environment: str | None = None
    last: Sequence[str] = ()

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.environment / "bin/python" if self.environment else Path(sys.executable)

    def execute(self, folder: Path, work: Path, changes: Mapping[str, Any]) -> Done:
        if not self.python.is_file():
            raise SystemExit(f"{self.python} is not there: `make bench-peers` makes the environments of the peers")
        folder.mkdir(parents=True)
        line: list[str | Path] = [self.python, *self.command, work, folder, str(changes["rounds"]), *self.last]
        begun, ended, memory = measured.run(line, _ALONE, folder / "log.txt")
        cost = Cost.of(begun, measured.times(folder), ended, memory)
        return Done(cost, load_file(folder / "round1.safetensors"), json.loads((folder / "packages.json").read_text()))


@dataclass(frozen=True)
class Fedlora(Contestant):
    """fedlora itself, by its command line (with Prefect and MLflow) or as a plain loop, in a home that it keeps."""

    command: Sequence[str | Path]
    tracked: bool
    more: Mapping[str, Any] = field(default_factory=dict)

    def execute(self, folder: Path, work: Path, changes: Mapping[str, Any]) -> Done:
        home, folder = folder.parent / "home", folder.absolute()
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(home / "cache/before", ignore_errors=True)  # everybody scores before training
        wanted = {**changes, **self.more, "keep_rounds": "null", "runner.device": "cpu", "runner.slots": PROCESSES}
        settings = [f"{key}={value}" for key, value in wanted.items()]
        given: list[str | Path] = ["demo", *settings, "--run-dir", folder] if self.tracked else [folder, *settings]
        log = folder.with_suffix(".log")
        begun, ended, memory = measured.run([*self.command, *given], _ALONE | {"FEDLORA_HOME": str(home)}, log)
        run, records = RunFolder.open(folder), rounds.records(RunFolder(folder))
        closed = [(run.path / run.record_name(record.round)).stat().st_mtime for record in records]
        count = None
        if self.tracked:
            count = sum(start > begun and name.startswith("round 2 ") for name, start, _ in tasks(home))
        named = ("torch", "transformers", "peft", "fedlora", *(("prefect", "mlflow") if self.tracked else ()))
        adapter = run.read_state(1).adapter.tensors()
        moved = [each["fetched"] / 1e6 for each in run.read_json("tables/workers.json") or ()]
        cost = Cost.of(begun, closed, ended, memory, count, moved)
        return Done(cost, adapter, {name: version(name) for name in named})


_RUN: list[str | Path] = [Path(sys.executable).with_name("fedlora"), "run"]
LIMIT = "limit"
PEERS: dict[str, Contestant] = {
    "one core": Script(["-m", "peers.by_hand"], last=["1"]),
    LIMIT: Script(["-m", "peers.by_hand"], last=[str(PROCESSES)]),
    "pfl": Script(
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}", "-m", "peers.with_pfl"], "pfl"
    ),
    "flower": Script(["-m", "peers.with_flower"], "flower"),
    "fedlora": Fedlora(_RUN, tracked=True),
    "fedlora loop": Fedlora([sys.executable, "-m", "peers.with_loop"], tracked=False),
}

CLUSTERS: dict[str, Contestant] = {
    kind: Fedlora(_RUN, tracked=True, more={"runner.kind": kind, "runner.shared_files": "false"})
    for kind in ("ray", "dask")
}
"""fedlora on local clusters of two workers that see nothing of the run folder."""
