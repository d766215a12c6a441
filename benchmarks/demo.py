"""Where the demo's time and memory go: runs `fedlora sweep demo` in a home of its own and splits its wall time.

    .venv/bin/python benchmarks/demo.py [--out docs/data/demo.json] [KEY=VALUE ...]

Phases come from the run folders (training, aggregation, evaluation) and from Prefect's task runs (tracking,
preparation); what is left of the wall time is orchestration. Memory is the largest sum of resident sizes over all
processes, read twice a second; memory that processes share counts in each.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import psutil

from fedlora import metrics
from fedlora.run import rounds
from fedlora.run.runfolder import RunFolder

_TRACKING = ("describe", "track", "publish")
_PREPARING = ("partition", "initialise")


def watch(command: list[str], home: Path) -> tuple[float, float, float]:
    """Run a command; when it began (seconds since 1970), its wall time in seconds, its peak memory in MB."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    begun, peak = time.time(), 0
    process = psutil.Popen(command, env=environ | {"FEDLORA_HOME": str(home)})
    while process.poll() is None:
        peak = max(peak, resident(process))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return begun, time.time() - begun, peak / 1e6


def resident(process: psutil.Process) -> int:
    """Bytes that a process and its descendants hold."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_info().rss
        except psutil.Error:
            continue
    return total


def phases(home: Path) -> dict[str, float]:
    """Seconds of training, aggregation and evaluation, summed over all rounds of all runs."""
    found = [record.metrics for path in (home / "runs").iterdir() for record in rounds.records(RunFolder(path))]
    names = {
        "training": metrics.TIME_TRAIN,
        "reading updates": metrics.TIME_READ,
        "aggregation": metrics.TIME_AGGREGATE,
        "ρ": metrics.TIME_DIVERGENCE,
        "evaluation": metrics.TIME_EVALUATE,
    }
    return {phase: sum(values[name] for values in found) for phase, name in names.items()}


def tasks(home: Path) -> list[tuple[str, float, float]]:
    """Prefect's task runs: name, begin and end in seconds since 1970; the last word of a name is its kind."""
    with sqlite3.connect(home / "prefect.db") as database:
        rows = database.execute("select name, start_time, end_time from task_run where end_time is not null").fetchall()
    return [(name, _seconds(begin), _seconds(end)) for name, begin, end in rows]


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text if "+" in text else text + "+00:00").timestamp()


def split(home: Path, begun: float, wall: float) -> dict[str, float]:
    """The wall time by what it was spent on; the parts add up to it."""
    done = [(name.split()[-1], begin, end) for name, begin, end in tasks(home)]
    first = min(end for kind, _, end in done if kind == "initialise")
    parts = {"start-up, to the first model in memory": first - begun}
    parts |= phases(home)
    later = [(kind, begin, end) for kind, begin, end in done if begin > first]
    parts["preparing the later runs"] = sum(end - begin for kind, begin, end in later if kind in _PREPARING)
    parts["tracking"] = sum(end - begin for kind, begin, end in done if kind in _TRACKING)
    return parts | {"orchestration and the rest": wall - sum(parts.values())}


def main() -> None:
    """Measure, print a Markdown table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="fedlora-bench-"))
    command = [str(Path(sys.executable).with_name("fedlora")), "sweep", "demo", *given.overrides]
    begun, wall, peak = watch(command, home)
    parts = split(home, begun, wall)
    print("\n| part | seconds | share |\n|---|---|---|")
    for name, seconds in [*parts.items(), ("wall time", wall)]:
        print(f"| {name} | {seconds:.1f} | {seconds / wall:.0%} |")
    print(f"\npeak memory of all processes: {peak:.0f} MB")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({"wall_s": wall, "peak_mb": peak, "parts_s": parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
