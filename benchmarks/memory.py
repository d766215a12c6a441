"""Peak memory of a worker that tunes a decoder, and of the loss: a process for each case, one thread.

    .venv/bin/python benchmarks/memory.py --out docs/data/memory.json         (a quarter of an hour, 8 GB, 3 GB of disk)
    .venv/bin/python benchmarks/memory.py --only logits

logits    one step of a small Llama with the vocabulary of SmolLM2 and of Qwen: the loss of the trained positions, in
          parts, against Transformers' own over all logits
worker    a client of two steps on SmolLM2-135M (`make decoder-model`) by precision, with and without checkpointing
billion   a Llama of the shape of Llama-3.2-1B, drawn at random: loaded and trained for one step in bf16 and in nf4
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from fedlora.config import ModelConfig, TrainingConfig
from fedlora.config.lora import LoraConfig
from fedlora.data.batches import pad
from fedlora.data.tokens import Examples, Padding
from fedlora.model.resident import ResidentModel
from fedlora.objective.generation import OBJECTIVE
from fedlora.seeds import Turn
from fedlora.training import client, memory

CPU = torch.device("cpu")
SMOLLM2 = "smollm2-135m"
BILLION = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
SMALL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
VOCABULARIES = {"SmolLM2's": 49_152, "Qwen's": 151_936}
PRECISIONS = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "int8": {"dtype": "bf16", "quantization": "int8"},
    "nf4": {"dtype": "bf16", "quantization": "nf4"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        case = json.loads(given.case)
        print(json.dumps(CASES[case.pop("part")](**case)))
        return
    found = {name: part() for name, part in PARTS.items() if given.only in (None, name)}
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


def measured(part: str, **case: Any) -> dict[str, Any]:
    """A case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps({"part": part, **case})]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


# -- the loss


def logits() -> list[dict[str, Any]]:
    """Both ways, by vocabulary and by how much of a text is trained."""
    rows = []
    for name, size in VOCABULARIES.items():
        for share in (0.25, 1.0):
            ours, theirs = (measured("logits", size=size, share=share, parts=parts) for parts in (True, False))
            row = {"vocabulary": name, "size": size, "trained": share, "trained positions": ours, "all logits": theirs}
            row["memory"] = theirs["added"] / ours["added"]
            row["time"] = theirs["seconds"] / ours["seconds"]
            rows.append(row)
            print(
                f"{name:10s} {size:7d}, {share:4.0%} trained: {ours['added'] / 1e6:6.0f} MB, {ours['seconds']:5.2f} s; "
                f"all logits {theirs['added'] / 1e6:6.0f} MB ({row['memory']:.1f}×), {theirs['seconds']:5.2f} s "
                f"({row['time']:.2f}×)"
            )
    return rows


def step(size: int, share: float, parts: bool) -> dict[str, float]:
    """The loss of a batch of 8 × 256 tokens, and its gradients: what it adds to memory, and the median time of 3."""
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), LlamaConfig(vocab_size=size, **SMALL), "float32")
        model = build(folder, {"dtype": "fp32"}, rank=8)
    model.trainable(frozenset({"A", "B"}))
    batch = pad(texts(8, 256, size, share), np.arange(8), Padding(0))

    def once() -> None:
        if parts:
            loss = OBJECTIVE.loss(model, batch).mean
        else:
            loss = model.peft(**batch.model_inputs(), labels=batch.labels, use_cache=False).loss
        torch.autograd.backward(loss)
        model.peft.zero_grad()

    once()
    times, before = [], resident()
    with memory.watched("cpu") as peak:
        for _ in range(3):
            begun = time.perf_counter()
            once()
            times.append(time.perf_counter() - begun)
    return {"added": peak.bytes - before, "seconds": sorted(times)[1]}


# -- a worker


def worker() -> list[dict[str, Any]]:
    """SmolLM2 by precision."""
    cases = [(name, False) for name in PRECISIONS] + [("fp32", True), ("bf16", True)]
    return [
        told(f"SmolLM2 {name}", less, measured("worker", model=SMOLLM2, how=name, less=less)) for name, less in cases
    ]


def billion() -> list[dict[str, Any]]:
    """The large shape, in bf16 and nf4."""
    with tempfile.TemporaryDirectory() as folder:
        measured("write", folder=folder)
        return [
            told(f"1B {how}", True, measured("worker", model=folder, how=how, less=True)) for how in ("bf16", "nf4")
        ]


def told(name: str, less: bool, found: dict[str, Any]) -> dict[str, Any]:
    kind = f"{name}{', checkpointing' if less else ''}"
    print(
        f"{kind:28s} base {found['base'] / 1e6:6.0f} MB, loaded {found['loaded'] / 1e9:5.2f} GB, "
        f"peak of loading {found['loading'] / 1e9:5.2f} GB, of training {found['training'] / 1e9:5.2f} GB, "
        f"{found['seconds']:6.2f} s a step"
    )
    return {"case": kind, **found}


def work(model: str, how: str, less: bool) -> dict[str, float]:
    """A client of two steps of 4 × 128 tokens, half of them trained: memory of the process, and seconds of a step."""
    began = resident()
    with memory.watched("cpu") as loading:
        found = build(model, {**PRECISIONS[how], "gradient_checkpointing": less}, rank=8)
    loaded, vocabulary = resident(), int(found.peft.config.vocab_size)
    training = TrainingConfig(local_steps=2, batch_size=4, learning_rate=1e-4)
    with memory.watched("cpu") as peak:
        trained = client.train(
            found,
            found.read(),
            texts(8, 128, vocabulary, 0.5),
            training,
            Turn(0, 1, 0),
            frozenset({"A", "B"}),
            Padding(0),
        )
    assert all(np.isfinite(trained.losses))
    base = sum(p.numel() * p.element_size() for p in found.peft.get_base_model().parameters() if not p.requires_grad)
    return {
        "libraries": began,
        "base": base,
        "loading": loading.bytes,
        "loaded": loaded,
        "training": peak.bytes,
        "seconds": trained.seconds / 2,
    }


def draw(folder: str) -> dict[str, float]:
    """Write the large model."""
    from transformers import LlamaConfig

    write(Path(folder), LlamaConfig(**BILLION), "bfloat16")
    return {}


# -- models and texts


def write(folder: Path, config: Any, dtype: str) -> None:
    """A random model, with numbers drawn in its own precision."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(
        folder, max_shard_size="500MB"
    )


def build(name: str, how: dict[str, Any], rank: int) -> ResidentModel:
    config, lora = ModelConfig(name=name, **how), LoraConfig(rank=rank)
    return ResidentModel.build(OBJECTIVE, config, lora, [], 0, 0, CPU)


def texts(count: int, length: int, vocabulary: int, share: float) -> Examples:
    """Random tokens, of which the last ones are trained."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, vocabulary, length).astype(np.int32) for _ in range(count)]
    targets = [np.where(np.arange(length) < length * (1 - share), -100, row).astype(np.int32) for row in ids]
    return Examples(ids, None, np.zeros(count, np.int64), np.full(count, length, np.int64), targets)


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {"logits": logits, "worker": worker, "billion": billion}
CASES: dict[str, Callable[..., dict[str, float]]] = {"logits": step, "worker": work, "write": draw}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
