"""What a client's training takes on this CPU in other ways: bf16, `torch.compile`, several clients in one pass.

    .venv/bin/python benchmarks/clients.py --out docs/data/clients.json     (six minutes, most of it compiling)

The demo's model and data on one thread, by turns. Processor time is the least of all repeats, after one that is not
counted, because other programs disturb it least.

ways      the same clients of 20 steps from one adapter: a step, what the first client took, and loss and accuracy on
          test examples after one client of many steps
together  eight clients of unlike sizes, so many in one pass; how far the numbers that come out are from one by one
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from fedlora.adapter import EVERY_PART, Adapter
from fedlora.config import DataConfig, ModelConfig, TrainingConfig
from fedlora.config.lora import LoraConfig
from fedlora.data import sources, tokens
from fedlora.data.tokens import Examples, Padding, TokenisedData
from fedlora.errors import ClientFailed
from fedlora.model.base import load_tokenizer
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import OBJECTIVE
from fedlora.seeds import Turn
from fedlora.training import client, cohort
from fedlora.training.client import Trained
from fedlora.training.cohort import Member

CPU = torch.device("cpu")
STEPS, LONG, TESTED = TrainingConfig().local_steps or 1, 300, 2000
SIZES = (310, 40, 150, 95, 620, 18, 210, 77)
AT_A_TIME = (1, 2, 4, 8)
WAYS = ("fp32", "bf16", "fp32, compiled", "bf16, compiled")


@dataclass(frozen=True)
class Row:
    """What a way of training takes and gives."""

    way: str
    step_ms: float
    first_client_s: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Shared:
    """Eight clients, so many in one pass: processor time of all, and how far they are from one by one."""

    at_a_time: int
    seconds: float
    apart: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--repeats", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = demo()
    examples = tokens.examples(data.train, np.arange(800))
    models = {way: built(way, data) for way in WAYS}
    start = models["fp32"].read()
    rows = {way: first(way, model, start, examples, data) for way, model in models.items()}
    for turn in range(given.repeats):
        for way in WAYS if turn % 2 else reversed(WAYS):
            taken = 1000 * seconds(models[way], start, examples, data, turn) / STEPS
            rows[way] = replace(rows[way], step_ms=min(taken, rows[way].step_ms))
    for way, model in models.items():
        rows[way] = after_many(rows[way], model, start, data)
        print(
            f"{way:15s} {rows[way].step_ms:6.2f} ms a step, first client {rows[way].first_client_s:5.1f} s, "
            f"loss {rows[way].loss:.4f}, accuracy {rows[way].accuracy:.4f}",
            flush=True,
        )
    shared = together(models["fp32"], start, data, given.repeats)
    if given.out:
        content = {"ways": [asdict(row) for row in rows.values()], "together": [asdict(row) for row in shared]}
        given.out.write_text(json.dumps(content, indent=1) + "\n")


def together(model: ResidentModel, start: Adapter, data: TokenisedData, repeats: int) -> list[Shared]:
    order = np.random.default_rng(0).permutation(len(data.train))
    rows = np.split(order[: sum(SIZES)], np.cumsum(SIZES)[:-1])
    members = [Member(start, tokens.examples(data.train, own), Turn(0, 1, who)) for who, own in enumerate(rows)]
    taken = dict.fromkeys(AT_A_TIME, float("inf"))
    found = {}
    for turn in range(repeats + 1):
        for size in AT_A_TIME:
            begun = time.process_time()
            found[size] = in_cohorts(model, members, data.padding, size)
            if turn:
                taken[size] = min(taken[size], time.process_time() - begun)
    result = []
    for size in AT_A_TIME:
        pairs = zip(found[1], found[size], strict=True)
        apart = max(float((a[name] - b[name]).abs().max()) for a, b in pairs for name in a)
        result.append(Shared(size, taken[size], apart))
        print(f"{size} at a time: {taken[size]:.2f} s, {apart:.1e} from one by one", flush=True)
    return result


def in_cohorts(model: ResidentModel, members: list[Member], padding: Padding, size: int) -> list[dict[str, Tensor]]:
    """What the clients come to, so many at a time."""
    training = TrainingConfig()
    came: list[Trained | ClientFailed] = []
    for first in range(0, len(members), size):
        some = members[first : first + size]
        if size > 1:
            came += cohort.train(model, some, training, EVERY_PART, padding)
        else:
            came += [client.train(model, m.start, m.examples, training, m.turn, EVERY_PART, padding) for m in some]
    return [each.adapter.tensors() for each in came if isinstance(each, Trained)]


def demo() -> TokenisedData:
    """The demo's data as tokens of its model."""
    with tempfile.TemporaryDirectory() as folder:
        text = sources.finish(OBJECTIVE.draft(DataConfig(), None, 0))
        path = OBJECTIVE.tokenise(text, load_tokenizer(ModelConfig()), DataConfig(), Path(folder))
        return tokens.open_tokens(path)


def built(way: str, data: TokenisedData) -> ResidentModel:
    precision, _, compiled = way.partition(", ")
    config = ModelConfig(dtype=precision)  # type: ignore[arg-type]
    model = ResidentModel.build(OBJECTIVE, config, LoraConfig(), list(data.labels), data.pad_token_id, 0, CPU)
    if compiled:
        model.peft.compile(dynamic=True)
    return model


def first(way: str, model: ResidentModel, start: Adapter, examples: Examples, data: TokenisedData) -> Row:
    begun = time.perf_counter()
    seconds(model, start, examples, data, 0)
    return Row(way, float("inf"), time.perf_counter() - begun, 0.0, 0.0)


def seconds(model: ResidentModel, start: Adapter, examples: Examples, data: TokenisedData, turn: int) -> float:
    """Processor time of a client."""
    begun = time.process_time()
    client.train(model, start, examples, TrainingConfig(), Turn(0, 1, turn), EVERY_PART, data.padding)
    return time.process_time() - begun


def after_many(row: Row, model: ResidentModel, start: Adapter, data: TokenisedData) -> Row:
    training = TrainingConfig(local_steps=LONG)
    examples = tokens.examples(data.train, np.arange(len(data.train)))
    client.train(model, start, examples, training, Turn(0, 1, 99), EVERY_PART, data.padding)
    scores = OBJECTIVE.evaluate(model, tokens.examples(data.test, np.arange(TESTED)), 64, data.padding)
    return replace(row, loss=scores.loss, accuracy=scores.accuracy)


if __name__ == "__main__":
    main()
