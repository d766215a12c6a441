"""Whether bf16 or `torch.compile` pay for a client on this CPU: the demo's model and data, one thread, by turns.

    .venv/bin/python benchmarks/precision.py --out docs/data/precision.json     (five minutes, most of it compiling)

Every way trains the same clients of 20 steps from one adapter. Processor time of a step (least of all repeats, after
one client that is not counted), what the first client took, and the test accuracy after one client of many steps.
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

from fedlora.adapter import EVERY_PART, Adapter
from fedlora.config import DataConfig, ModelConfig, TrainingConfig
from fedlora.config.lora import LoraConfig
from fedlora.data import sources, tokens
from fedlora.data.tokens import Examples, TokenisedData
from fedlora.model.base import load_tokenizer
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import OBJECTIVE
from fedlora.seeds import Turn
from fedlora.training import client

CPU = torch.device("cpu")
STEPS, LONG, TESTED = TrainingConfig().local_steps or 1, 300, 2000
WAYS = ("fp32", "bf16", "fp32, compiled", "bf16, compiled")


@dataclass(frozen=True)
class Row:
    """What a way of training takes and gives."""

    way: str
    step_ms: float
    first_client_s: float
    loss: float
    accuracy: float


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
    if given.out:
        given.out.write_text(json.dumps([asdict(row) for row in rows.values()], indent=1) + "\n")


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
