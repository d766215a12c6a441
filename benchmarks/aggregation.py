"""Seconds and peak memory of the aggregation alone, one thread, against the usual dense way.

    .venv/bin/python benchmarks/aggregation.py --out docs/data/aggregation.json            (half an hour)
    .venv/bin/python benchmarks/aggregation.py --only ratio                                (five minutes)

ratio     svd in factor space against a dense sum with a full SVD and against PEFT's add_weighted_adapter("svd")
cells     strategies, per module: BERT-base and LLaMA-7B shapes, ranks, numbers of clients; and the cost of ρ
modules   ρ, floor, R, P, Q of all modules of small models, a few clients
clients   fedlora.aggregate on 10,000 BERT-base adapter folders (hard links to 100 different ones)

Each measurement runs in a process of its own, forked after the inputs were made: its memory is what it adds to them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.divergence import measure
from fedlora.adapter.updates import Update, Updates
from fedlora.exchange.aggregation import aggregate
from fedlora.exchange.peftfolder import write_peft_folder
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.step import advance

SHAPES = {"BERT-base q, v": ((768, 768), 24), "LLaMA-7B q, v": ((4096, 4096), 64), "LLaMA-7B up": ((11008, 4096), 32)}
"""Shape of one module, and how many of it the model has. LLaMA's all-linear adapters are 128 of 4096² (q, k, v, o) and
96 of 11008 × 4096 (up, gate) or its transpose (down)."""
SOME = [(rank, clients) for rank in (8, 16, 64) for clients in (10, 100)]
CELLS = {
    "BERT-base q, v": [*SOME, (8, 1000), (8, 10000)],
    "LLaMA-7B q, v": [*SOME, (8, 1000), (8, 10000)],
    "LLaMA-7B up": [(16, 10), (16, 100)],
}
"""Ranks and numbers of clients for each."""
STRATEGIES = ["fedit", "replication", "lora-fair", "fedex-lora", "flora", "flora-na", "svd"]
"""Unless others are asked for."""
MODELS = {
    "BERT-base q, v": ((768, 768), 24, 8, 10),
    "BERT-base, every linear layer of attention": ((768, 768), 48, 8, 10),
    "as wide as BERT-Tiny": ((128, 128), 48, 8, 10),
}
"""Shape and number of modules, rank, clients."""
LIMIT_S = 60
DISTINCT = 20
"""Different adapters among the clients of a cell; more clients share them, which changes no operation."""


def pool(shape: tuple[int, int], rank: int, count: int) -> list[Adapter]:
    """Trained-looking adapters: around a common one, fp32."""
    d_out, d_in = shape
    generator = torch.Generator().manual_seed(rank)
    B, A = torch.randn(d_out, rank, generator=generator), torch.randn(rank, d_in, generator=generator)
    return [
        Adapter(
            {
                "m": Factors(
                    B + 0.3 * torch.randn(d_out, rank, generator=generator),
                    A + 0.3 * torch.randn(rank, d_in, generator=generator),
                )
            }
        )
        for _ in range(min(count, DISTINCT))
    ]


def updates_of(adapters: list[Adapter], clients: int) -> Updates:
    return Updates.collect(Update(u, 1 + u % 7, adapters[u % len(adapters)]) for u in range(clients))


def start(shape: tuple[int, int], rank: int, strategy: Strategy, adapters: list[Adapter]) -> ServerState:
    shared = adapters[0].factors["m"]
    return ServerState(Adapter({"m": Factors(torch.zeros(shape[0], rank), shared.A)}), scaling=2.0)


# -- one measurement, in a process of its own ----------------------------------------------------------------------


def measured(job: Callable[[], Any], limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Seconds and added peak memory (MB) of a job, or why there is none."""
    mine, theirs = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=_child, args=(job, theirs))
    process.start()
    theirs.close()
    try:
        if not mine.poll(limit_s):
            return {"note": f"> {limit_s:g} s"}
        return dict(mine.recv())
    except EOFError:
        return {"note": "out of memory"}
    finally:
        process.kill()
        process.join()


def _child(job: Callable[[], Any], pipe: Connection) -> None:
    torch.set_num_threads(1)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    begun = time.perf_counter()
    value = job()
    seconds = time.perf_counter() - begun
    pipe.send({"seconds": seconds, "mb": (_status("VmHWM") - before) / 1000, "value": value})


def _status(key: str) -> float:
    """A line of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(key)).split()[1])


# -- what is measured -----------------------------------------------------------------------------------------------


def ratio() -> list[dict[str, Any]]:
    """svd at 768² and 4096² against the dense way and PEFT's, ten clients."""
    rows = []
    for shape, rank in (((768, 768), 8), ((4096, 4096), 16)):
        adapters = pool(shape, rank, 10)
        updates, strategy = updates_of(adapters, 10), registry.make("svd")
        state = start(shape, rank, strategy, adapters)
        once = partial(advance, strategy, state, updates)
        ours = min((measured(lambda: _least(5, once)) for _ in range(3)), key=_seconds)  # noqa: B023
        dense = measured(lambda: _dense(updates, rank) and None, 600)  # noqa: B023
        peft = measured(lambda: _peft_svd(updates, shape, rank), 600)  # noqa: B023
        ours["seconds"] = ours["value"]
        rows.append({"shape": shape, "rank": rank, "clients": 10, "svd": ours, "dense": dense, "peft": peft})
        print(
            f"{shape[0]}² r {rank}: svd {ours['seconds'] * 1e3:.1f} ms, dense sum + full SVD {_shown(dense)} "
            f"({_times(dense, ours)}), PEFT svd {_shown(peft)} ({_times(peft, ours)})",
            flush=True,
        )
    return rows


def _least(times: int, job: Callable[[], Any]) -> float:
    """The least seconds of several tries."""
    best = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        job()
        best = min(best, time.perf_counter() - begun)
    return best


def _dense(updates: Updates, rank: int) -> bool:
    """The usual way: the sum of dense products and a full SVD, in fp32."""
    total = sum(w * f.product() for w, f in zip(updates.weights.tolist(), updates.factors("m"), strict=True))
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    root = s[:rank].sqrt()
    return bool((u[:, :rank] * root @ (root[:, None] * vh[:rank])).isfinite().all())


def _peft_svd(updates: Updates, shape: tuple[int, int], rank: int) -> None:
    import peft
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.Linear(shape[1], shape[0], bias=False)

    model = peft.get_peft_model(Net(), peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["m"]))
    names = []
    for index, pair in enumerate(updates.factors("m")):
        names.append(f"c{index}")
        model.add_adapter(names[-1], model.peft_config["default"])
        model.base_model.model.m.lora_A[names[-1]].weight.data.copy_(pair.A)
        model.base_model.model.m.lora_B[names[-1]].weight.data.copy_(pair.B)
    model.add_weighted_adapter(names, updates.weights.tolist(), "mean", combination_type="svd", svd_rank=rank)


def cells(strategies: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Strategies on one module of each shape, and ρ of a broadcast."""
    for name, (shape, modules) in SHAPES.items():
        for rank, clients in CELLS[name]:
            adapters = pool(shape, rank, clients)
            updates = updates_of(adapters, clients)
            row: dict[str, Any] = {"shape": name, "modules": modules, "rank": rank, "clients": clients}
            for chosen in strategies:
                row[chosen] = _cell(chosen, shape, rank, adapters, updates)
            row["ρ"] = measured(lambda: measure(updates, [adapters[0]] * clients, common=True) and None)  # noqa: B023
            print(_line(row), flush=True)
            yield row


def _cell(name: str, shape: tuple[int, int], rank: int, adapters: list[Adapter], updates: Updates) -> dict[str, Any]:
    strategy = registry.make(name)
    state = start(shape, rank, strategy, adapters)
    return measured(lambda: advance(strategy, state, updates) and None)


def modules() -> list[dict[str, Any]]:
    """ρ and what is measured with it, of whole models: milliseconds a round."""
    rows = []
    for name, (shape, count, rank, clients) in MODELS.items():
        pools = [pool(shape, rank, clients) for _ in range(count)]
        factors = [{f"m{i}": each[u].factors["m"] for i, each in enumerate(pools)} for u in range(clients)]
        adapters = [Adapter(each) for each in factors]
        updates = updates_of(adapters, clients)
        found = measured(lambda: _least(15, lambda: measure(updates, [adapters[0]] * clients, common=True)))  # noqa: B023
        rows.append({"model": name, "modules": count, "rank": rank, "clients": clients, **found})
        print(f"{name}, {count} modules, r {rank}, {clients} clients: ρ {found['value'] * 1e3:.1f} ms", flush=True)
    return rows


def clients(count: int = 10000, different: int = 100) -> list[dict[str, Any]]:
    """`fedlora.aggregate` on that many BERT-base adapter folders (q, v, rank 8)."""
    folder = Path(tempfile.mkdtemp(prefix="fedlora-bench-"))
    try:
        paths = _folders(folder, count, different)
        rows = []
        for name in ("fedit", "svd", "flora", "lora-fair"):
            found = measured(lambda: aggregate(paths, name).divergence.rho, 1800)  # noqa: B023
            rows.append({"clients": count, "strategy": name, **found})
            print(f"{count} clients, {name}: {_shown(found)}, ρ {found.get('value')}", flush=True)
        return rows
    finally:
        shutil.rmtree(folder)


def _folders(folder: Path, count: int, different: int) -> list[Path]:
    names = [f"encoder.layer.{n}.attention.self.{part}" for n in range(12) for part in ("query", "value")]
    generator = torch.Generator().manual_seed(0)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
    paths: list[Path] = []
    for index in range(count):
        path = folder / f"client-{index:05d}"
        if index < different:
            factors = {
                name: Factors(torch.randn(768, 8, generator=generator), torch.randn(8, 768, generator=generator))
                for name in names
            }
            write_peft_folder(Adapter(factors), path, config, "")
        else:
            path.mkdir()
            for file in paths[index % different].iterdir():
                os.link(file, path / file.name)
        paths.append(path)
    return paths


# -- what is printed ------------------------------------------------------------------------------------------------


def _seconds(found: dict[str, Any]) -> float:
    return float(found.get("value", float("inf")))


def _shown(found: dict[str, Any]) -> str:
    return found["note"] if "note" in found else f"{found['seconds']:.3g} s, {found['mb']:.0f} MB"


def _times(found: dict[str, Any], ours: dict[str, Any]) -> str:
    return "–" if "note" in found else f"{found['seconds'] / ours['seconds']:.0f}×"


def _line(row: dict[str, Any]) -> str:
    parts = " | ".join(f"{name} {_shown(row[name])}" for name in _columns(row))
    return f"{row['shape']} r {row['rank']} U {row['clients']}: {parts}"


def _columns(row: dict[str, Any]) -> list[str]:
    return [name for name, value in row.items() if isinstance(value, dict)]


def markdown(results: dict[str, Any]) -> str:
    """The tables of docs/performance.md."""
    lines: list[str] = []
    for row in results.get("cells", []):
        if not lines:
            lines += [f"| module | r | U | {' | '.join(_columns(row))} |", "|---" * (len(_columns(row)) + 3) + "|"]
        values = " | ".join(_shown(row[name]) for name in _columns(row))
        lines.append(f"| {row['shape']} | {row['rank']} | {row['clients']} | {values} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["ratio", "cells", "modules", "clients"])
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="of cells, with commas")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    jobs: dict[str, Callable[[], Any]] = {
        "ratio": ratio,
        "cells": lambda: list(cells(arguments.strategies.split(","))),
        "modules": modules,
        "clients": clients,
    }
    wanted = [arguments.only] if arguments.only else list(jobs)
    torch.set_num_threads(1)
    results = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    for name in wanted:
        results[name] = jobs[name]()
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1, default=str) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
