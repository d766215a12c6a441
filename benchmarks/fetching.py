"""How fast a worker of a cluster gets the files of a run: into the engine's store, out of it, and into its cache.

    .venv/bin/python benchmarks/fetching.py --megabytes 1024

A local cluster of one worker on loopback: what a network adds is not in it. Each figure in MB/s; the digest is taken
while the file is written.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from deployments.local import environment

environment.prepare()

from fedlora.config import RunnerConfig
from fedlora.files import filesets
from fedlora.files.atomic import write_json
from fedlora.files.filesets import Cache, FileSet
from fedlora.run.request import Held
from tasks import engines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--engines", default="ray,dask", help="with a comma")
    given = parser.parse_args()
    print("| engine | into the store, MB/s | out of it, checked and written, MB/s |\n|---|---|---|")
    found = {}
    for kind in given.engines.split(","):
        with tempfile.TemporaryDirectory(prefix="fedlora-bench-") as folder:
            into, out = measured(kind, Path(folder), given.megabytes)
        print(f"| {kind} | {into:.0f} | {out:.0f} |", flush=True)
        found[kind] = {"into": into, "out": out}
    if given.out:
        write_json(given.out.absolute(), found)


def measured(kind: str, folder: Path, megabytes: int) -> tuple[float, float]:
    """Both rates of an engine."""
    with (folder / "file").open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(10**6))
    wanted = filesets.described(folder, ["file"])
    with engines.opened(RunnerConfig.model_validate({"kind": kind, "slots": 1})) as engine:
        begun = time.perf_counter()
        held = [engine.put(content) for content in filesets.chunks(folder / "file")]
        into = megabytes / (time.perf_counter() - begun)
        host = next(iter(engine.hosts()))
        seconds = engine.there(host, fetched, str(folder / "cache"), wanted, held)
    return into, megabytes / seconds


def fetched(cache: str, wanted: FileSet, held: Sequence[Held]) -> float:
    """Seconds that a worker needs."""
    begun = time.perf_counter()
    Cache(Path(cache), 2**40).have(wanted, lambda file: (each.get() for each in held))
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
