"""What one client more, and one megabyte more, cost whoever orchestrates: the constants of docs/scale.md.

    .venv/bin/python benchmarks/scale.py --clients 100000

Dealing rows, drawing clients, the roll of a round, and an upload of a 7B model's adapter (r 16 on q and v of 32 layers
of 4,096) written, read, checked and averaged. Nothing is trained.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.updates import Update, Updates
from fedlora.channel import uploads
from fedlora.config import PartitionConfig, configfile
from fedlora.data.partition import Partition, Split, partition
from fedlora.files.atomic import write_json
from fedlora.files.tensorfile import serialise
from fedlora.run import participation
from fedlora.run.participation import Entry
from fedlora.run.runfolder import RunFolder
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState

_FOUND: dict[str, dict[str, float | None]] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| what | seconds | MB |\n|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as folder:
        _clients(Path(folder), given.clients)
        _large(Path(folder), given.layers)
    if given.out:
        write_json(given.out.absolute(), _FOUND)


def _clients(folder: Path, count: int) -> None:
    labels = np.random.default_rng(0).integers(0, 20, 2 * count)
    train, test = Split(labels, None), Split(labels[: count // 10], None)
    dealing = PartitionConfig(name="iid", min_size=1)
    what = f"{2 * count:,} rows dealt to {count:,} clients"
    dealt: Partition = _timed(what, lambda: partition(dealing, count, 0, train, test, [*map(str, range(20))], ""))
    dealt.save(folder / "dealt.npz")
    _timed("… read again", lambda: Partition.load(folder / "dealt.npz"), (folder / "dealt.npz").stat().st_size / 1e6)
    config = configfile.build({"clients": count, "fraction": 0.01, "partition.min_size": 1})
    _timed(f"{count // 100:,} of {count:,} clients drawn", lambda: participation.drawn(config, 1))
    entries = [asdict(Entry(client, 0, "completed", digest="0" * 64)) for client in range(count)]
    run = RunFolder(folder)
    _timed(
        f"the roll of a round in which all {count:,} take part, written", lambda: run.write_json("roll", {"e": entries})
    )
    _timed("… read", lambda: run.read_json("roll"), (folder / "roll").stat().st_size / 1e6)


def _large(folder: Path, layers: int) -> None:
    names = [f"layers.{layer}.self_attn.{side}" for layer in range(layers) for side in ("q_proj", "v_proj")]
    start = Adapter({name: Factors(torch.zeros(16, 4096), torch.zeros(4096, 16)) for name in names}, {})
    sent = Adapter({name: Factors(torch.randn(16, 4096), torch.randn(4096, 16)) for name in names}, {})
    content = _timed(f"an adapter of {len(names)} modules of 4,096², r 16, as bytes", lambda: serialise(sent.tensors()))
    (folder / "a.safetensors").write_bytes(content)
    size = len(content) / 1e6
    _timed("… read and checked", lambda: uploads.inspect(folder / "a.safetensors", start, "one"), size)
    updates = Updates.collect([Update(client, 1, sent) for client in range(10)])
    state = ServerState(start, scaling=1.0, seed=0, ranks={})
    _timed("ten of them averaged (fedit)", lambda: registry.make("fedit").aggregate(state, updates), 10 * size)


def _timed(what: str, call: Callable[[], Any], megabytes: float | None = None) -> Any:
    begun = time.perf_counter()
    found = call()
    seconds, size = time.perf_counter() - begun, "" if megabytes is None else f"{megabytes:.1f}"
    print(f"| {what} | {seconds:.2f} | {size} |", flush=True)
    _FOUND[what] = {"seconds": seconds, "megabytes": megabytes}
    return found


if __name__ == "__main__":
    main()
