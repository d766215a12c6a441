"""How long a person waits for `fedlora run demo`: until the first score, and from the last round to the prompt.

    .venv/bin/python benchmarks/startup.py [--repeats 5] [--against OTHER/.venv/bin/fedlora] [--out FILE.json]

Each run is a process of its own in a home that is warm: one run before, not counted, makes databases and data. With
`--against`, the command of another checkout has a home of its own, and the two run by turns, so that what else the
machine does meets both. Stages are read from the lines that the command prints and from the times of Prefect's tasks;
processor seconds are those of all processes together, read ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path

import psutil

OURS = Path(sys.executable).with_name("fedlora")
STAGES = {
    "checked": "configuration checked",
    "flow": "Prefect's server is up, the flow has begun",
    "ready": "data and model are ready",
    "first": "first score",
    "prompt": "from the last round to the prompt",
    "total": "whole command, one round",
    "cpu_first": "processor seconds until the first score",
    "cpu": "processor seconds in all",
}
_LINES = {
    "checked": r"^run folder: ",
    "flow": r" clients, \d+ rounds?,",
    "first": r"before training",
    "last": r"round 1/1",
}


class Clock:
    """Processor seconds of a process and all its descendants, ended ones as they were last seen."""

    def __init__(self, root: psutil.Process) -> None:
        self._root = root
        self._seen: dict[int, float] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            self.read()
            time.sleep(0.1)

    def read(self) -> float:
        """The sum so far."""
        try:
            for process in [self._root, *self._root.children(recursive=True)]:
                used = process.cpu_times()
                self._seen[process.pid] = used.user + used.system
        except psutil.Error:
            pass
        return float(sum(self._seen.values()))


def once(command: Path, home: Path, overrides: list[str]) -> dict[str, float]:
    """One run; seconds of its stages from the start of the command."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    words = [str(command), "run", "demo", "rounds=1", *overrides]
    begun, wall = time.monotonic(), time.time()
    process = psutil.Popen(words, env=environ | {"FEDLORA_HOME": str(home)}, stdout=-1, text=True)
    clock, found = Clock(process), {}
    for line in process.stdout:
        for stage, pattern in _LINES.items():
            if stage not in found and re.search(pattern, line):
                found[stage] = time.monotonic() - begun
                if stage == "first":
                    found["cpu_first"] = clock.read()
    if process.wait() or set(_LINES) - set(found):
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    found["total"] = time.monotonic() - begun
    found["cpu"] = clock.read()
    found["prompt"] = found["total"] - found.pop("last")
    found["ready"] = _ready(home) - wall
    return found


def _ready(home: Path) -> float:
    """When the last run had its model, in seconds since 1970."""
    with sqlite3.connect(home / "prefect.db") as database:
        query = "select max(end_time) from task_run where name like '%initialise'"
        text = str(database.execute(query).fetchone()[0])
    return datetime.fromisoformat(text if "+" in text else text + "+00:00").timestamp()


def main() -> None:
    """Measure by turns, print a Markdown table of medians, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", type=Path, metavar="FEDLORA", help="the `fedlora` of another checkout")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    commands = {"before": given.against.absolute(), "now": OURS} if given.against else {"now": OURS}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-", ignore_cleanup_errors=True) as folder:
        for repeat in range(given.repeats + 1):
            for name, command in commands.items():
                found = once(command, Path(folder) / name, given.overrides)
                if repeat:
                    runs[name].append(found)
                    print(name, *(f"{stage} {found[stage]:.1f}" for stage in STAGES), file=sys.stderr, flush=True)
    print(f"\n| seconds, median of {given.repeats} | {' | '.join(runs)} |\n|---|{'---|' * len(runs)}")
    for stage, words in STAGES.items():
        print(f"| {words} |" + "".join(f" {statistics.median(r[stage] for r in each):.1f} |" for each in runs.values()))
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
