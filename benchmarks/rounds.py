"""What a round costs with Prefect and MLflow, beside a loop written by hand over two processes: the limit.

    .venv/bin/python benchmarks/rounds.py --out docs/data/rounds.json        (a quarter of an hour)
    .venv/bin/python benchmarks/rounds.py --only W2 --against OTHER/.venv/bin/fedlora

W1  the demo's FedIT: 10 clients of 20 steps, 6 rounds
W2  100 clients of one step, 3 rounds
W3  1,000 clients of one step, 3 rounds

The loop holds everything in memory: two processes with a model each, to which clients are dealt in turn; no files, no
tasks, no tracking. Both train and score the same; the adapters after round one must agree, or the comparison is void.
A round is from one record to the next, the median of those after the first. The loop's start-up is without the imports
of this process, and its memory with what it holds; memory is the largest sum of resident sizes of all processes, read
twice a second (shared memory counts in each).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import psutil
import torch
from demo import resident, tasks

from deployments.shipped import PRESETS
from fedlora.adapter import Adapter
from fedlora.adapter.divergence import measure
from fedlora.adapter.updates import Update, Updates
from fedlora.config import RunConfig, configfile
from fedlora.data import tokens
from fedlora.data.partition import Partition
from fedlora.objective.classification import OBJECTIVE
from fedlora.run import jobs, rounds
from fedlora.run.records import Setup
from fedlora.run.runfolder import RunFolder
from fedlora.seeds import Turn
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.step import advance
from fedlora.training import client
from fedlora.training.workers import Workbench

ONE_STEP = {"training.local_steps": 1, "partition.name": "iid"}
WORKLOADS: dict[str, dict[str, Any]] = {
    "W1": {"strategy": "fedit", "rounds": 6},
    "W2": {"strategy": "fedit", "rounds": 3, "clients": 100, **ONE_STEP},
    "W3": {"strategy": "fedit", "rounds": 3, "clients": 1000, "partition.min_size": 1, **ONE_STEP},
}
PROCESSES = 2


@dataclass(frozen=True)
class Cost:
    """Of one execution: seconds and megabytes."""

    start_up: float
    """Until the first score, of the model before training."""
    round: float
    total: float
    memory: float
    tasks: float | None = None
    """Prefect's task runs for a round."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--only", choices=WORKLOADS, help="one workload")
    parser.add_argument("--against", type=Path, metavar="FEDLORA", help="the `fedlora` of another checkout")
    given = parser.parse_args()
    ours = {"fedlora": Path(sys.executable).with_name("fedlora")}
    commands = ours | ({"before": given.against.absolute()} if given.against else {})
    found: dict[str, dict[str, Any]] = {}
    print("| | | start-up, s | round, s | in all, s | memory, MB | task runs a round |\n|---|---|---|---|---|---|---|")
    for name, changes in WORKLOADS.items():
        if given.only in (None, name):
            found[name] = {}
            with tempfile.TemporaryDirectory(prefix="fedlora-bench-", ignore_cleanup_errors=True) as folder:
                for kind, cost, adapter in executions(changes, commands, Path(folder)):
                    found[name][kind] = asdict(cost)
                    first = found[name].setdefault("_", adapter)
                    assert agree(first, adapter), f"{name}: {kind} did not do the same work"
                    print(f"| {name} | {kind} | {words(cost)} |", flush=True)
            del found[name]["_"]
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


def words(cost: Cost) -> str:
    count = "–" if cost.tasks is None else f"{cost.tasks:.0f}"
    return f"{cost.start_up:.1f} | {cost.round:.2f} | {cost.total:.1f} | {cost.memory:.0f} | {count}"


def agree(one: Adapter, other: Adapter) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return all(torch.allclose(mine[name], theirs[name], atol=1e-6) for name in mine)


def executions(changes: dict[str, Any], commands: dict[str, Path], folder: Path) -> Iterator[tuple[str, Cost, Adapter]]:
    """The loop, and each command in a home that it has used before; with the adapter after round one."""
    config = configfile.load("demo", {**changes, "runner.device": "cpu"}, PRESETS)
    yield "loop by hand", *by_hand(config, folder / "hand")
    for kind, command in commands.items():
        once(command, {"rounds": 1}, folder / kind, "warm")
        cost = once(command, {**changes, "keep_rounds": "null"}, folder / kind, "run")
        yield kind, cost, RunFolder.open(folder / kind / "runs/run").read_state(1).adapter


# -- fedlora


def once(command: Path, changes: dict[str, Any], home: Path, name: str) -> Cost:
    """A run of the command line in a process of its own."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    settings = [f"{key}={value}" for key, value in {**changes, "runner.slots": PROCESSES}.items()]
    begun = time.time()
    line = [str(command), "run", "demo", *settings, "--run-dir", str(home / "runs" / name)]
    process = psutil.Popen(line, env=environ | {"FEDLORA_HOME": str(home)}, stdout=-1, text=True)
    peak, first = Peak(process), 0.0
    for said in process.stdout:
        if not first and re.search("before training", said):
            first = time.time() - begun
    if process.wait():
        raise SystemExit(f"{' '.join(line)} ended with {process.returncode}")
    total = time.time() - begun
    run = RunFolder(home / "runs" / name)
    records = rounds.records(run)
    closed = [(run.path / run.record_name(record.round)).stat().st_mtime for record in records]
    each = [after - before for before, after in pairwise(closed[1:] if len(closed) > 2 else closed)]
    count = sum(start > begun and task.startswith("round 2 ") for task, start, _ in tasks(home))
    return Cost(first, statistics.median(each), total, peak.stop(), count)


class Peak:
    """The most that a process and its descendants hold together while it lives."""

    def __init__(self, process: psutil.Process) -> None:
        self._megabytes, self._ended, self._process = 0.0, False, process
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._ended and self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            self._megabytes = max(self._megabytes, resident(self._process) / 1e6)
            time.sleep(0.5)

    def stop(self) -> float:
        """Megabytes so far."""
        self._ended = True
        return self._megabytes


# -- by hand


def by_hand(config: RunConfig, path: Path) -> tuple[Cost, Adapter]:
    """The same run, everything in memory, two processes."""
    begun, peak = time.time(), Peak(psutil.Process())
    context = multiprocessing.get_context("spawn")
    pipes = []
    for half in range(PROCESSES):
        mine, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, path, half), daemon=True).start()
        pipes.append(mine)
    run, bench = RunFolder.create(path, config), Workbench("cpu")
    torch.set_num_threads(1)
    jobs.prepare_data(bench, path)
    jobs.initialise(bench, path)
    bench.kept.clear()
    state, strategy = ServerState(run.read_state(0).adapter), registry.make(config.strategy)
    told(pipes, (0, state.adapter.tensors()))
    start_up, each, first = time.time() - begun, [], state.adapter
    for number in range(1, config.rounds + 1):
        since = time.time()
        sent = [one for answer in told(pipes, (number, state.adapter.tensors())) for one in answer]
        updates = Updates.collect(Update(who, many, adapter_of(arrays)) for who, many, arrays in sorted(sent, key=_who))
        state = advance(strategy, state, updates)
        measure(updates, [state.adapter] * len(updates), common=True)
        told(pipes, (0, state.adapter.tensors()))
        each.append(time.time() - since)
        first = state.adapter if number == 1 else first
    for pipe in pipes:
        pipe.send(None)
    return Cost(start_up, statistics.median(each[1:] or each), time.time() - begun, peak.stop()), first


def adapter_of(arrays: dict[str, Any]) -> Adapter:
    return Adapter.from_tensors({name: torch.from_numpy(array) for name, array in arrays.items()})


def _who(sent: tuple[int, int, Any]) -> int:
    return sent[0]


def told(pipes: Sequence[Any], what: Any) -> list[Any]:
    """What each process answers."""
    for pipe in pipes:
        pipe.send(what)
    return [pipe.recv() for pipe in pipes]


def work(pipe: Any, path: Path, half: int) -> None:
    """A process: round 0 scores its part of the test set, another round trains its clients and scores their models."""
    torch.set_num_threads(1)
    import peft  # noqa: F401

    bench = Workbench("cpu")
    while (what := pipe.recv()) is not None:
        number, tensors = what
        run = RunFolder(path)
        config, start = run.config, Adapter.from_tensors(tensors)
        data, model = tokens.open_tokens(Setup.read(run).tokens), jobs._loaded(run, bench)
        parts = Partition.load(path / "partition.npz")
        if not number:
            model.load(start)
            score(model, data, np.arange(half, len(data.test), PROCESSES), config)
            pipe.send(None)
            continue
        sent = []
        for chosen in range(half, config.clients, PROCESSES):
            examples = tokens.examples(data.train, parts.train[chosen])
            turn, parts_trained = Turn(config.seed, number, chosen), run.strategy.plan(number).trains
            trained = client.train(model, start, examples, config.training, turn, parts_trained, data.padding)
            score(model, data, parts.test[chosen], config)
            arrays = {name: tensor.numpy() for name, tensor in trained.adapter.tensors().items()}
            sent.append((chosen, len(examples), arrays))  # a tensor would travel as an open file
        pipe.send(sent)


def score(model: Any, data: tokens.TokenisedData, rows: Any, config: RunConfig) -> None:
    OBJECTIVE.evaluate(model, tokens.examples(data.test, rows), config.evaluation.batch_size, data.padding)


if __name__ == "__main__":
    main()
