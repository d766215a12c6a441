"""One execution of a contestant in processes of its own: what it costs, and the adapter that it comes to."""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import torch
from torch import Tensor

FARTHEST = 1e-6
"""How far a number of two adapters after round one may be apart: float32, added up in another order."""


class Void(SystemExit):
    """A contestant that did not do the work of the others."""


class Failed(SystemExit):
    """An execution ended with an error; says which, and the end of what it wrote."""


@dataclass(frozen=True)
class Cost:
    """Of one execution: seconds and megabytes."""

    start_up: float
    """From the command to the scores after round one, less a round: however a contestant deals with what it does once,
    before the first score or after it."""
    round: float
    """From one round's scores to the next's, the median of those after the first."""
    total: float
    """From the command to its end."""
    memory: float
    """The most that all its processes hold together; what some share counts once (PSS)."""
    tasks: float | None = None
    """Prefect's task runs for a round."""
    moved: Sequence[float] = ()
    """Megabytes that each worker of a cluster has fetched."""

    @classmethod
    def of(
        cls,
        begun: float,
        scored: Sequence[float],
        ended: float,
        memory: float,
        tasks: float | None = None,
        moved: Sequence[float] = (),
    ) -> Cost:
        """From the moments of a command and of the scores of each round, from round 0."""
        each = [after - before for before, after in pairwise(scored[1:] if len(scored) > 2 else scored)]
        usual = statistics.median(each)
        return cls(max(0.0, scored[1] - begun - usual), usual, ended - begun, memory, tasks, moved)


def run(line: Sequence[str | Path], environ: Mapping[str, str], log: Path) -> tuple[float, float, float]:
    """Run a command; when it began and ended (seconds since 1970), and the most megabytes that it held.

    Raises:
        Failed: it did not end with 0.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW", "FEDLORA"))}
    begun = time.time()
    with log.open("w") as file:
        process = psutil.Popen(list(map(str, line)), env={**kept, **environ}, stdout=file, stderr=file)
        peak = _Peak(process)
        failed = process.wait()
    ended = time.time()
    if failed:
        said = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        raise Failed(f"{said}\n\n{' '.join(map(str, line))} ended with {failed}")
    return begun, ended, peak.stop()


class _Peak:
    """The most that a process and its descendants hold together while it lives."""

    def __init__(self, process: psutil.Process) -> None:
        self._megabytes, self._ended, self._process = 0.0, threading.Event(), process
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            self._megabytes = max(self._megabytes, held(self._process) / 1e6)

    def stop(self) -> float:
        """Megabytes, once the process has ended."""
        self._ended.set()
        self._thread.join()
        return self._megabytes


def held(process: psutil.Process) -> int:
    """Bytes that a process and its descendants hold; of what several share, each has its part (PSS)."""
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for member in family:
        try:
            total += member.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def times(out: Path) -> list[float]:
    """When a contestant had scored each round, from 0, in seconds since 1970."""
    return [json.loads(line)["at"] for line in (out / "scored.jsonl").read_text().splitlines()]


def apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of a number of two adapters; infinite if they have not the same tensors."""
    if {name: tensor.shape for name, tensor in one.items()} != {name: tensor.shape for name, tensor in other.items()}:
        return float("inf")
    gaps = torch.stack([(one[name].double() - other[name].double()).abs().max() for name in one])
    return float("inf") if gaps.isnan().any() else float(gaps.max())


def check_same(name: str, adapter: Mapping[str, Tensor], limit: Mapping[str, Tensor]) -> float:
    """How far a contestant's adapter after round one is from the limit's.

    Raises:
        Void: too far for the same work.
    """
    far = apart(adapter, limit)
    if far > FARTHEST:
        raise Void(
            f"the comparison is void: after round one the adapter of {name} is {far:.2g} from that of the limit; at "
            f"most {FARTHEST:g} is the same work"
        )
    return far
