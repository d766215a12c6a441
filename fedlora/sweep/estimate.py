"""What a run will take, by trying a little of it: a few steps of two clients and a part of the evaluation."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedlora.config import RunConfig
from fedlora.config.channel import ChannelConfig
from fedlora.data.partition import Partition
from fedlora.run import jobs
from fedlora.run.records import ClientRecord, Part, Setup
from fedlora.run.runfolder import RunFolder
from fedlora.sweep.plan import Cell
from fedlora.training import workers
from fedlora.training.workers import Pool

_STEPS = 8
_EXAMPLES = 256
_OVERHEAD = 1.15
"""Aggregation, divergence, tracking and orchestration, as a share of training and evaluation (docs/performance.md)."""


@dataclass(frozen=True)
class Pace:
    """How fast one worker is at a kind of run, and what it needs."""

    setup: float
    """Seconds until the data is ready and the model loaded."""
    step: float
    """Seconds of one optimiser step."""
    example: float
    """Seconds to score one example."""
    worker_bytes: int
    """Most memory of a worker process, on a GPU that of the device."""
    test: int
    """Test examples."""
    train: int
    """Training examples of all clients together."""
    local_test: float
    """Test examples of a client, on average."""


@dataclass(frozen=True)
class Cost:
    """What a run is expected to take."""

    seconds: float
    memory: int
    """Bytes of all its workers together."""


def sweep(cells: Iterable[Cell]) -> dict[str, Cost]:
    """The cost of runs of a sweep, by digest; runs alike in what takes the time share one trial.

    Raises:
        FedloraError: whatever would stop the run itself.
    """
    paces: dict[str, Pace] = {}
    costs = {}
    for cell in cells:
        key = _kind(cell.config)
        if key not in paces:
            paces[key] = pace(cell.config)
        costs[cell.digest] = cost(cell.config, paces[key])
    return costs


def _kind(config: RunConfig) -> str:
    content = config.model_dump(mode="json", include={"model", "data", "partition", "clients", "lora"})
    sizes = [config.training.batch_size, config.training.step_size, config.evaluation.batch_size]
    content |= {"batches": sizes, "device": config.runner.device}
    return json.dumps([content, config.runner.threads], sort_keys=True)


def cost(config: RunConfig, pace: Pace) -> Cost:
    """Seconds and memory of a run whose workers have this pace."""
    slots = len(workers.slot_devices(config.runner))
    chosen = config.clients_asked
    steps = config.training.local_steps or math.ceil(
        (config.training.local_epochs or 1) * pace.train / config.clients / config.training.step_size
    )
    client = steps * pace.step + (pace.local_test * pace.example if config.evaluation.local else 0)
    scoring = pace.test * pace.example / slots
    one_round = math.ceil(chosen / slots) * client + scoring / config.evaluation.every
    return Cost(pace.setup + config.rounds * one_round * _OVERHEAD + 2 * scoring, slots * pace.worker_bytes)


def pace(config: RunConfig) -> Pace:
    """Try a run for some seconds in a worker of its own; nothing of it is kept but the tokenised data.

    Raises:
        FedloraError: whatever would stop the run itself.
    """
    trial = _trial(config)
    with tempfile.TemporaryDirectory(prefix="fedlora-") as folder, workers.open_pool(trial.runner) as pool:
        run = RunFolder.create(Path(folder) / "run", trial)
        begun = time.perf_counter()
        pool.run(jobs.prepare_data, run.path)
        pool.run(jobs.initialise, run.path)
        setup = time.perf_counter() - begun
        for client in range(min(2, trial.clients)):
            pool.run(jobs.fine_tune, run.path, 1, client)
        last = ClientRecord.from_json(run.need_json(f"{run.client_stem(1, client)}.json"), run.objective.scores)
        examples, scoring = _score(pool, run)
        memory = pool.run(jobs.peak_memory)
        test, parts = Setup.read(run).examples["test"], Partition.load(run.path / "partition.npz")
    step = last.seconds / len(last.losses)
    local = sum(parts.test_sizes) / parts.clients
    return Pace(setup, step, scoring / examples, memory, test, sum(parts.sizes), local)


def _trial(config: RunConfig) -> RunConfig:
    """The run, cut short: one round of two clients (the first warms up), one worker, plain averaging."""
    training = config.training.model_copy(
        update={"local_steps": min(config.training.local_steps or _STEPS, _STEPS), "local_epochs": None, "cohort": 1}
    )
    return config.model_copy(
        update={
            "strategy": "fedit" if not config.lora.mixed_ranks else "zero-padding",
            "strategy_options": {},
            "rounds": 1,
            "fraction": min(1.0, 2 / config.clients),
            "training": training,
            "evaluation": config.evaluation.model_copy(update={"local": False}),
            "lora": config.lora.model_copy(update={"truncation": "first"}),
            "channel": ChannelConfig(),
            "runner": config.runner.model_copy(update={"slots": 1, "kind": "processes"}),
        }
    )


def _score(pool: Pool, run: RunFolder) -> tuple[int, float]:
    """Score some examples twice; their number, and the seconds of the second time."""
    test = Setup.read(run).examples["test"]
    step = math.ceil(test / _EXAMPLES)
    part = Part("global", step=step)
    pool.run(jobs.evaluate, run.path, 0, part)
    begun = time.perf_counter()
    pool.run(jobs.evaluate, run.path, 0, part)
    return math.ceil(test / step), time.perf_counter() - begun
