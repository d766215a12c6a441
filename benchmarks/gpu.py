"""How many clients a GPU trains a second, one by one and many in one pass of the base, at the sizes of known models.

    python3 benchmarks/gpu.py --out gpu.json                              (every model, 1 to 64 clients at a time)
    python3 benchmarks/gpu.py --models roberta-base --clients 1,8,64 --dtype fp32
    python3 benchmarks/gpu.py --device cpu --smaller 16                    (the same with small shapes: does it run?)

Needs torch, transformers and peft, and nothing that must be fetched: weights are drawn from configurations. A client is
so many steps of so many examples, all of one length. One client at a time is `fedlora.training.client`, several are
`fedlora.training.cohort`. The share is that of the rate of a large bf16 product of the same minute, counting four
operations for each weight and token (forward, and the gradients of what comes in); of attention nothing. Before that,
four clients are trained both ways, on a GPU without dropout: the largest difference of a number of their adapters and
heads is told.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.append(str(HERE / "plain"))  # where pydantic is missing

import numpy as np
import torch
import transformers
from torch import nn

from fedlora.adapter import EVERY_PART
from fedlora.config import ModelConfig, TrainingConfig
from fedlora.config.lora import LoraConfig
from fedlora.data.tokens import Examples, Padding
from fedlora.errors import counted
from fedlora.model.arithmetic import DTYPES
from fedlora.model.heads import PooledClassifier
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import Classification
from fedlora.objective.generation import Generation
from fedlora.seeds import Turn
from fedlora.training import client, cohort, memory
from fedlora.training.client import Trained
from fedlora.training.cohort import Member
from fedlora.training.draws import NoDraws

LABELS = 16
BERTS = {  # hidden units, layers, heads
    "bert-tiny": (128, 2, 2),
    "minilm-l6": (384, 6, 12),
    "roberta-base": (768, 12, 12),
}
BILLION = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
}
MODELS = (*BERTS, "decoder-1b")


@dataclass(frozen=True)
class Row:
    """A model with so many clients at a time."""

    model: str
    clients: int
    clients_s: float
    against_one: float
    memory_mb: float
    share: float
    """Of the rate of a bf16 product."""


@dataclass(frozen=True)
class Work:
    """What a client does."""

    steps: int
    batch: int
    tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--models", default=",".join(MODELS), help="some of them, with commas")
    parser.add_argument("--clients", default="1,2,4,8,16,32,64", help="at a time; the first is what others are held to")
    parser.add_argument("--steps", type=int, default=20, help="of a client")
    parser.add_argument("--batch", type=int, default=16, help="examples of a step; a quarter of them for the decoder")
    parser.add_argument("--tokens", type=int, default=64, help="of an example; four times as many for the decoder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smaller", type=int, default=1, help="what widths are divided by, to see whether it runs")
    given = parser.parse_args()
    device = torch.device(given.device)
    rate = product_rate(device)
    print(f"{named(device)}, {given.dtype}; a bf16 product: {rate / 1e12:.3g} TFLOP/s", flush=True)
    found, apart = [], {}
    for name in given.models.split(","):
        large = name not in BERTS
        batch, tokens = (max(1, given.batch // 4), 4 * given.tokens) if large else (given.batch, given.tokens)
        model, work = built(name, given.dtype, device, given.smaller), Work(given.steps, batch, tokens)
        apart[name] = difference(name, model, work)
        print(f"{name:14s} one by one and together: {apart[name]:.1e} apart after {counted(work.steps, 'step')}")
        sizes = [int(size) for size in given.clients.split(",")]
        found += list(measured(name, model, work, sizes, rate, given.repeats))
        del model
        torch.cuda.empty_cache()
    if given.out:
        versions = {each.__name__: each.__version__ for each in (torch, transformers)}
        about = {"device": named(device), "dtype": given.dtype, "product_flops": rate, "versions": versions}
        content = {**about, "difference": apart, "rows": [asdict(row) for row in found]}
        given.out.write_text(json.dumps(content, indent=1) + "\n")


def named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def members_of(name: str, model: ResidentModel, work: Work, count: int) -> list[Member]:
    start = model.read()
    return [Member(start, drawn(work, place, name not in BERTS), Turn(0, 1, place)) for place in range(count)]


def alone(model: ResidentModel, each: Member, training: TrainingConfig) -> Trained:
    return client.train(model, each.start, each.examples, training, each.turn, EVERY_PART, Padding(0))


def training_of(work: Work) -> TrainingConfig:
    return TrainingConfig(local_steps=work.steps, batch_size=work.batch, learning_rate=1e-3)


def difference(name: str, model: ResidentModel, work: Work) -> float:
    """The largest of the numbers that four clients come to alone and together."""
    members, training = members_of(name, model, work, 4), training_of(work)
    with nullcontext() if model.device.type == "cpu" else NoDraws():
        one_by_one = [alone(model, each, training) for each in members]
        together = cohort.train(model, members, training, EVERY_PART, Padding(0))
    model.load(members[0].start)
    found = 0.0
    for one, other in zip(one_by_one, together, strict=True):
        assert isinstance(other, Trained)
        pairs = zip(one.adapter.tensors().values(), other.adapter.tensors().values(), strict=True)
        found = max(found, *(float((a - b).abs().max()) for a, b in pairs))
    return found


def measured(name: str, model: ResidentModel, work: Work, sizes: list[int], rate: float, repeats: int) -> Iterator[Row]:
    """A row for each number of clients, until the memory is too small for more."""
    everybody, training = members_of(name, model, work, max(sizes)), training_of(work)
    operations = 4 * weights(model.peft) * work.steps * work.batch * work.tokens
    first = None
    for size in sizes:

        def once(members: list[Member] = everybody[:size]) -> None:
            if len(members) > 1:
                cohort.train(model, members, training, EVERY_PART, Padding(0))
            else:
                alone(model, members[0], training)

        try:
            seconds, peak = timed(once, model.device, repeats)
        except torch.OutOfMemoryError:
            print(f"{name:14s} {size:3d} at a time: out of memory", flush=True)
            return
        first = first or size / seconds
        row = Row(name, size, size / seconds, size / seconds / first, peak / 1e6, operations * size / seconds / rate)
        print(
            f"{name:14s} {size:3d} at a time: {row.clients_s:8.3g} clients/s, {row.against_one:5.2f}×, "
            f"{row.memory_mb:8,.0f} MB, {row.share:6.1%} of the product's rate",
            flush=True,
        )
        yield row


def timed(once: Callable[[], None], device: torch.device, repeats: int) -> tuple[float, int]:
    """Median seconds after one to warm up, and the peak of memory in bytes."""
    once()
    taken = []
    with memory.watched(str(device)) as peak:
        for _ in range(repeats):
            wait(device)
            begun = time.perf_counter()
            once()
            wait(device)
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken), peak.bytes


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device) -> float:
    """Operations a second of a large bf16 product, the best of some."""
    side = 8192 if device.type == "cuda" else 512
    left, right = (torch.ones(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = 0.0
    for _ in range(10):
        wait(device)
        begun = time.perf_counter()
        left @ right
        wait(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - begun))
    return best


# -- models and examples, drawn


class Drawn:
    """An objective whose network is drawn from its configuration."""

    network: Callable[[], nn.Module]

    def load(self, *_: Any) -> nn.Module:
        torch.manual_seed(0)
        return self.network()


class DrawnClassifier(Drawn, Classification):
    pass


class DrawnWriter(Drawn, Generation):
    pass


def built(name: str, dtype: str, device: torch.device, smaller: int) -> ResidentModel:
    """A model with an adapter of rank 8 on its query and value projections."""
    objective = DrawnClassifier() if name in BERTS else DrawnWriter()
    objective.network = lambda: network(name, DTYPES[dtype], smaller)  # type: ignore[method-assign]
    labels = [str(label) for label in range(LABELS)] if name in BERTS else []
    config, lora = ModelConfig(name=name, dtype=dtype), LoraConfig(rank=8 if smaller == 1 else 4)  # type: ignore[arg-type]
    return ResidentModel.build(objective, config, lora, labels, 0, 0, device)


def network(name: str, dtype: torch.dtype, smaller: int) -> nn.Module:
    """The base, in its precision; a classifier's head in fp32."""
    if name in BERTS:
        hidden, layers, heads = BERTS[name]
        heads = max(1, heads // smaller)
        config = transformers.BertConfig(
            vocab_size=30_522 // smaller,
            hidden_size=max(16, hidden // smaller // heads * heads),
            num_hidden_layers=min(layers, 2) if smaller > 1 else layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden // smaller,
        )
        encoder = transformers.AutoModel.from_config(config).to(dtype)
        return PooledClassifier(encoder, LABELS, "mean")
    shape = {key: value if key == "num_hidden_layers" else value // smaller for key, value in BILLION.items()}
    shape |= {"num_hidden_layers": 2, "num_key_value_heads": 1} if smaller > 1 else {}
    plain = transformers.LlamaConfig(**shape, vocab_size=32_000 // smaller, max_position_embeddings=4096)
    writer: nn.Module = transformers.AutoModelForCausalLM.from_config(plain).to(dtype)
    return writer


def weights(network: nn.Module) -> int:
    """Of the base's linear layers, but of what puts out words."""
    layers = [layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and "lora_" not in name]
    return sum(layer.weight.numel() for layer in layers if layer.out_features < 30_000)


def drawn(work: Work, seed: int, dialogues: bool) -> Examples:
    """As many as a client sees, each for the first time; of dialogues every token is trained."""
    generator = np.random.default_rng(seed)
    count = work.steps * work.batch
    ids = list(generator.integers(3, 1500, (count, work.tokens)).astype(np.int32))
    lengths = np.full(count, work.tokens, dtype=np.int64)
    return Examples(ids, None, generator.integers(0, LABELS, count), lengths, ids if dialogues else None)


if __name__ == "__main__":
    main()
