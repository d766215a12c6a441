"""What Prefect and MLflow cost: the same training, with the same batches, as a bare loop and as the flow.

    .venv/bin/python benchmarks/orchestration.py [--rounds 8] [--out docs/data/orchestration.json]

Both run in this process, on one resident model, one client after the other, taking turns by rounds: a machine that
slows down slows both. The bare loop is what one would write by hand: model, data and adapters in memory, no files, no
tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["FEDLORA_HOME"] = tempfile.mkdtemp(prefix="fedlora-bench-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from deployments.local import environment

environment.prepare("CRITICAL")

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from deployments.local import private_server
from deployments.shipped import PRESETS
from fedlora.adapter.divergence import measure
from fedlora.adapter.updates import Update, Updates
from fedlora.config import RunConfig, configfile
from fedlora.data import tokens
from fedlora.data.partition import Partition
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import OBJECTIVE, Confusion
from fedlora.run import jobs, participation, rounds
from fedlora.run.play import play_round
from fedlora.run.records import Setup
from fedlora.run.runfolder import RunFolder
from fedlora.run.server import Server
from fedlora.seeds import Turn
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.step import advance
from fedlora.training import client, workers
from flows.logbook import Logbook
from flows.progress import Progress
from tasks.federated import Run, TaskHands


def bare_loop(run: RunFolder, model: ResidentModel) -> Iterator[float]:
    """Rounds by hand, everything in memory; yields the global accuracy after each."""
    config, strategy = run.config, registry.make(run.config.strategy)
    data = tokens.open_tokens(Setup.read(run).tokens)
    parts = Partition.load(run.path / "partition.npz")
    state = ServerState(run.read_state(0).adapter)
    for number in range(1, config.rounds + 1):
        uploads = []
        for chosen in participation.drawn(config, number):
            examples = tokens.examples(data.train, parts.train[chosen])
            turn = Turn(config.seed, number, chosen)
            trained = client.train(
                model, state.adapter, examples, config.training, turn, strategy.plan(number).trains, data.padding
            )
            score(model, data, parts.test[chosen], config)
            uploads.append(Update(chosen, len(examples), trained.adapter))
        updates = Updates.collect(uploads)
        state = advance(strategy, state, updates)
        measure(updates, [state.adapter] * len(updates), common=True)
        model.load(state.adapter)
        yield score(model, data, np.arange(len(data.test)), config).accuracy


def score(model: ResidentModel, data: tokens.TokenisedData, rows: np.ndarray, config: RunConfig) -> Confusion:
    examples = tokens.examples(data.test, rows)
    return OBJECTIVE.evaluate(model, examples, config.evaluation.batch_size, data.padding)


_TASKS: Any = ThreadPoolTaskRunner(max_workers=16)


@flow(task_runner=_TASKS)
def side_by_side(folder: RunFolder) -> dict[str, list[float]]:
    """A round of the flow, then the same round of the bare loop, and so on; seconds of each."""
    results: dict[str, list[float]] = {"flow_s": [], "bare_s": []}
    config, run = folder.config, Run(Server(folder))
    with workers.open_pool(config.runner) as pool:
        hands, logbook = TaskHands(run, lambda: None), Logbook(run, "benchmark", None, Progress())
        hands.prepare()
        hands.initialise()

        def play(number: int) -> None:
            logbook.round(play_round(run.server, number, hands, logbook))
            logbook.catch_up()  # within the round that is measured

        play(0)
        slot = pool.slots[0]
        assert isinstance(slot, workers.ThreadSlot), "both loops share this process's model"
        bare = bare_loop(folder, jobs._loaded(folder, slot._bench))
        for number in range(1, config.rounds + 1):
            begun = time.perf_counter()
            play(number)
            middle = time.perf_counter()
            accuracy = next(bare)
            results["bare_s"].append(time.perf_counter() - middle)
            results["flow_s"].append(middle - begun)
            record = rounds.read_record(folder, number)
            assert record is not None
            assert accuracy == record.metrics["global/accuracy"], "the two did not do the same work"
    return results


def main() -> None:
    """Measure, print a table, and write the numbers."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=8)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    changes = {"rounds": given.rounds, "runner.kind": "threads", "runner.device": "cpu"}
    folder = RunFolder.create(Path(os.environ["FEDLORA_HOME"]) / "run", configfile.load("demo", changes, PRESETS))
    with private_server.available():
        results = side_by_side(folder)
    warm = [(flowed, bare) for flowed, bare in zip(results["flow_s"], results["bare_s"], strict=True)][1:]
    shares = [(flowed - bare) / flowed for flowed, bare in warm]
    summary = {
        "rounds": len(warm),
        "flow round, median s": round(statistics.median(flowed for flowed, _ in warm), 3),
        "bare round, median s": round(statistics.median(bare for _, bare in warm), 3),
        "share of orchestration, median": round(statistics.median(shares), 4),
        "share of orchestration, worst": round(max(shares), 4),
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    for name, value in summary.items():
        print(f"{name:<32} {value}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({**summary, **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
