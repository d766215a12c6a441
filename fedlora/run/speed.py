"""How fast a machine is at what runs consist of: training, writing, clients, aggregation; each measured, in a minute or
two, beside the rate of a plain matrix product of the same minute."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from fedlora import __version__, objective
from fedlora.adapter import Adapter, Factors
from fedlora.adapter.divergence import measure
from fedlora.adapter.updates import Update, Updates
from fedlora.config import RunConfig, configfile
from fedlora.config.generate import GenerateConfig
from fedlora.data import questions, sources, tokens
from fedlora.data.batches import training_rows
from fedlora.errors import counted
from fedlora.model.base import load_tokenizer
from fedlora.model.resident import ResidentModel
from fedlora.model.writing import Marks, write
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder
from fedlora.seeds import Turn, torch_generator
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.step import advance
from fedlora.training import client
from fedlora.training.workers import slot_devices, use_threads

_REPEATS = 3
_SIDE = {"cpu": 1024, "cuda": 8192, "mps": 4096}
"""Of the matrices that are multiplied."""
_DATA = {"training.local_steps": 10, "data.train_size": 512, "data.test_size": 100}
_MODELS: tuple[dict[str, Any], ...] = (
    {**_DATA, "model.name": "bert-tiny"},
    {**_DATA, "task": "generation", "model.name": "llama-tiny", "data.name": "wordnet-definitions"},
)
_WORDS = "lm_head"
_CLIENTS = 40
_SHAPE, _RANK, _MODULES, _UPLOADS = (768, 768), 8, 24, 10
"""Adapters of BERT-base's query and value projections, from ten clients."""


@dataclass(frozen=True)
class Measured:
    """One figure."""

    what: str
    value: float
    unit: str


@dataclass(frozen=True)
class Machine:
    """Where it was measured, and with what."""

    processor: str
    cores: int
    memory_gb: float
    device: str
    threads: int
    versions: dict[str, str]

    @classmethod
    def here(cls, device: torch.device, threads: int) -> Machine:
        """This one."""
        named = {name: version(name) for name in ("torch", "transformers", "peft")}
        return cls(
            _processor(),
            os.cpu_count() or 1,
            round(psutil.virtual_memory().total / 1e9, 1),
            torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            threads,
            {"fedlora": __version__, "python": platform.python_version(), **named},
        )


def figures(device: torch.device, threads: int) -> Iterator[Measured]:
    """The figures, as they are measured.

    Args:
        device: of models and products.
        threads: of the CPU, for each process, as `runner.threads`.

    Raises:
        FedloraError: a packaged model or set cannot be loaded.
    """
    use_threads(threads)
    rate = max(_product(device, torch.float32, repeats=2 * _REPEATS), 1.0)
    yield Measured("matrix product, fp32", rate / 1e9, "GFLOP/s")
    yield Measured("matrix product, bf16", _product(device, torch.bfloat16) / 1e9, "GFLOP/s")
    for settings in _MODELS:
        yield from _model(configfile.build(settings), device, rate)
    yield from _clients(threads)
    yield from _aggregation()


def _processor() -> str:
    """Its name; where the system does not tell, its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _median(job: Callable[[], Any], device: torch.device, repeats: int = _REPEATS) -> float:
    """Seconds of a job, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def _product(device: torch.device, dtype: torch.dtype, repeats: int = _REPEATS) -> float:
    """Floating-point operations a second."""
    side = _SIDE.get(device.type, _SIDE["cpu"])
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _median(lambda: left @ right, device, repeats)


def _model(config: RunConfig, device: torch.device, rate: float) -> Iterator[Measured]:
    """Training as a client does it, and writing where a model writes."""
    found, data, name = objective.find(config.task), config.data, config.model.name
    with tempfile.TemporaryDirectory() as folder:
        text, tokenizer = sources.finish(found.draft(data, None, 0)), load_tokenizer(config.model)
        split = tokens.open_tokens(found.tokenise(text, tokenizer, data, Path(folder)))
        examples = tokens.examples(split.train, np.arange(len(split.train)))
        asked = questions.questions(split.test, range(32)).asked if config.task == "generation" else []
    labels, pad_token = list(split.labels), split.pad_token_id
    model = ResidentModel.build(found, config.model, config.lora, labels, pad_token, 0, device)
    start, turn = model.read(), Turn(0, 1, 0)
    parts = registry.make("fedit").plan(1).trains
    order = torch_generator(turn.seed, "batches", turn.round, turn.client)
    rows = training_rows(examples, config.training.step_size, int(config.training.local_steps or 1), order)
    count = sum(int(examples.lengths[each].sum()) for each in rows)
    seconds = _median(lambda: client.train(model, start, examples, config.training, turn, parts, split.padding), device)
    yield Measured(f"training, {name}", count / seconds, "tokens/s")
    yield Measured(
        f"training, {name}: share of the product's rate", 100 * 4 * _weights(model.peft) * count / seconds / rate, "%"
    )
    if asked:
        how, marks = GenerateConfig(max_new_tokens=32, batch_size=32), Marks.of(model.peft, tokenizer)
        written = sum(map(len, write(model, asked, how, marks)))
        yield Measured(
            f"writing, {name}", written / _median(lambda: write(model, asked, how, marks), device), "tokens/s"
        )


def _weights(network: nn.Module) -> int:
    """Numbers that are multiplied for each token, forward and again for the gradient of what comes in: 4 operations
    each, for frozen weights have no gradient of their own (our reading; attention, embeddings and what writes words,
    which few tokens meet, are left out)."""
    layers = [layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and _WORDS not in name]
    return sum(layer.weight.numel() for layer in layers)


def _clients(threads: int) -> Iterator[Measured]:
    """Clients of one step in a round of the plain loop: how many a second, and what is not their training."""
    settings = {
        "clients": _CLIENTS,
        "rounds": 2,
        "training.local_steps": 1,
        "data.train_size": 2000,
        "data.test_size": 100,
        "partition.name": "iid",
        "evaluation.local": False,
        "runner.threads": threads,
        "runner.device": "cpu",
    }
    with tempfile.TemporaryDirectory() as folder:
        config = configfile.build(settings)
        last = train(config, Path(folder) / "run")[-1].metrics["time/train_s"]
        run = RunFolder.open(Path(folder) / "run")
        rows = run.read_json("tables/clients.json") or []
        trained = sum(row["seconds"] for row in rows if row["round"] == config.rounds)
    slots = len(slot_devices(config.runner))
    yield Measured(f"clients of one step, {counted(slots, 'worker')}", _CLIENTS / last, "clients/s")
    yield Measured("a client beside its training", 1000 * max(0.0, last * slots - trained) / _CLIENTS, "ms")


def _aggregation() -> Iterator[Measured]:
    """Of ten adapters, in this process."""
    generator = torch.Generator().manual_seed(0)
    d_out, d_in = _SHAPE

    def drawn(around: Factors | None = None) -> Factors:
        B, A = torch.randn(d_out, _RANK, generator=generator), torch.randn(_RANK, d_in, generator=generator)
        return Factors(B, A) if around is None else Factors(around.B + 0.3 * B, around.A + 0.3 * A)

    start = Adapter({f"m{number}": drawn() for number in range(_MODULES)})
    sent = [Adapter({m: drawn(pair) for m, pair in start.factors.items()}) for _ in range(_UPLOADS)]
    updates = Updates.collect(Update(number, 1, adapter) for number, adapter in enumerate(sent))
    state, cpu = ServerState(start, scaling=2.0), torch.device("cpu")
    for name in ("fedit", "svd", "flora-na"):
        seconds = _median(lambda name=name: advance(registry.make(name), state, updates), cpu)  # type: ignore[misc]
        yield Measured(f"aggregation, {name}", 1000 * seconds, "ms")
    seconds = _median(lambda: measure(updates, [state.adapter] * _UPLOADS, common=True), cpu)
    yield Measured("ρ, its floor, R, P, Q", 1000 * seconds, "ms")
