"""Two hundred rounds with faults on, under each runner: does anything grow that should not?

    .venv/bin/python benchmarks/soak.py [--rounds 200] [--out docs/data/soak.json] [--figure docs/images/soak.png]

Runs `fedlora run` (its own Prefect server, MLflow in a SQLite file) in a home of its own, and reads every other second
what the command and all its children hold: resident memory (pages that processes share count in each), open files,
threads; and the sizes of the two databases and of the run folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

SETTINGS: dict[str, Any] = {
    "strategy": "flora-na",
    "data.train_size": 400,
    "data.test_size": 120,
    "data.max_length": 16,
    "clients": 6,
    "fraction": 0.5,
    "training.local_steps": 2,
    "training.batch_size": 8,
    "partition.min_size": 2,
    "runner.device": "cpu",
    "channel.over_selection": 0.5,
    "channel.deadline_s": 25,
    "channel.faults.crash": 0.1,
    "channel.faults.delay": "exponential",
    "channel.faults.corrupt": 0.1,
}
RUNNERS = ("threads", "processes")
PANELS = {
    "memory_mb": "resident memory (MB)",
    "files": "open files",
    "threads": "threads",
    "prefect_mb": "Prefect database (MB)",
    "mlflow_mb": "MLflow database (MB)",
    "folder_mb": "run folder (MB)",
}
_EVERY_S = 2.0


def sample(process: psutil.Process, home: Path, folder: Path) -> dict[str, float]:
    """What the run holds now, and the last round that it has closed."""
    memory = files = threads = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            memory += member.memory_info().rss
            files += member.num_fds()
            threads += member.num_threads()
        except psutil.Error:  # it has just ended
            continue
    closed = sum(1 for _ in folder.glob("rounds/*/record.json"))
    return {
        "round": closed - 1,
        "memory_mb": memory / 1e6,
        "files": files,
        "threads": threads,
        "prefect_mb": _size(home.glob("prefect.db*")),
        "mlflow_mb": _size(home.glob("mlflow.db*")),
        "folder_mb": _size(folder.rglob("*")),
    }


def _size(paths: Any) -> float:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total / 1e6


def soak(kind: str, number: int, home: Path) -> list[dict[str, float]]:
    """Samples of one run with this many rounds."""
    folder = home / "run"
    words = [f"{key}={value}" for key, value in {**SETTINGS, "rounds": number, "runner.kind": kind}.items()]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    process = psutil.Popen(
        [sys.executable, "-m", "fedlora_cli", "run", "demo", *words, "--run-dir", str(folder)],
        env=environ | {"FEDLORA_HOME": str(home)},
    )
    samples = []
    while process.poll() is None:
        samples.append(sample(process, home, folder))
        time.sleep(_EVERY_S)
    if process.returncode:
        raise SystemExit(f"{kind}: the run ended with {process.returncode}")
    return [each for each in samples if each["round"] >= 0]


def growth(samples: Sequence[Mapping[str, float]], number: int) -> dict[str, dict[str, float]]:
    """Of everything that is watched: its mean in the second and in the last tenth of the rounds."""

    def mean(name: str, low: float, high: float) -> float:
        values = [each[name] for each in samples if low * number <= each["round"] < high * number]
        return round(sum(values) / len(values), 2) if values else float("nan")

    return {name: {"early": mean(name, 0.1, 0.2), "late": mean(name, 0.9, 1.0)} for name in PANELS}


def draw(runs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """A panel for each thing that is watched, over the rounds; a line per runner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for kind, samples in runs.items():
            axes.plot([each["round"] for each in samples], [each[name] for each in samples], label=kind)
        axes.set(title=title, xlabel="round", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(title="runner.kind")
    figure.savefig(path, dpi=110)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=200)
    arguments.add_argument("--out", type=Path, help="where the samples are written, as JSON")
    arguments.add_argument("--figure", type=Path, help="where they are drawn, as PNG")
    given = arguments.parse_args()
    runs: dict[str, list[dict[str, float]]] = {}
    for kind in RUNNERS:
        with tempfile.TemporaryDirectory(prefix="fedlora-soak-") as home:
            runs[kind] = soak(kind, given.rounds, Path(home))
        print(kind, json.dumps(growth(runs[kind], given.rounds)), flush=True)
    if given.out:
        content = {"rounds": given.rounds, "settings": SETTINGS, "samples": runs}
        content["growth"] = {kind: growth(samples, given.rounds) for kind, samples in runs.items()}
        given.out.write_text(json.dumps(content) + "\n")
    if given.figure:
        draw(runs, given.figure)


if __name__ == "__main__":
    main()
