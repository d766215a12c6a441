"""What a round costs: fedlora beside loops by hand, and beside pfl-research and Flower.

    make bench-peers        (all contestants on W1 and W2, three times)
    .venv/bin/python benchmarks/rounds.py --contestants fedlora --only W3 --repeats 1
    .venv/bin/python benchmarks/rounds.py --contestants fedlora --only W2 --against OTHER/.venv/bin/fedlora
    .venv/bin/python benchmarks/rounds.py --contestants fedlora,ray,dask

W1  the demo's FedIT: 10 clients of 20 steps, 6 rounds
W2  100 clients of one step, 3 rounds
W3  1,000 clients of one step, 3 rounds (only when asked for)

one core      a loop by hand, everything in memory: no files, no tasks, no tracking
limit         the same, clients dealt to two processes: the limit of what two cores can do
pfl           pfl-research, two processes
flower        Flower's simulation on Ray, two client actors of one core each
fedlora       `fedlora run` with Prefect and MLflow, two workers
fedlora loop  fedlora's library alone, two workers
ray, dask     `fedlora run` on a local cluster of two workers that see nothing of the run folder (only when asked for)

All do the same work: fedlora exports tokens, partition, the batches of each client in each round, seeds of dropout and
the adapter at the start; clients' models and the global one are scored on the same test rows. After round one every
contestant's adapter must be that of the limit, within 1e-6, or the comparison is void. What is in a contestant's favour
or against it: reading and dealing the data is done before for all but fedlora; fedlora alone measures ρ in each round
and writes every client's adapter to disk with its digest.

Contestants run by turns, so that what else the machine does meets all of them, after one round each that is not
counted. Start-up is from the command to the scores after round one, less a round; a round is from its scores to the
next round's, the median of those after the first. Memory is the largest sum over all processes, read twice a second; of
what several share, each has its part (PSS). Cells are the median of the repeats, in brackets the least and the most.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
from peers import exported
from peers.contestants import CLUSTERS, LIMIT, PEERS, Contestant, Done, Fedlora
from peers.measured import Cost, Failed, check_same

from deployments.shipped import PRESETS
from fedlora.config import configfile
from fedlora.files.atomic import write_json

ONE_STEP = {"training.local_steps": 1, "partition.name": "iid"}
WORKLOADS: dict[str, dict[str, Any]] = {
    "W1": {"strategy": "fedit", "rounds": 6},
    "W2": {"strategy": "fedit", "rounds": 3, "clients": 100, **ONE_STEP},
    "W3": {"strategy": "fedit", "rounds": 3, "clients": 1000, "partition.min_size": 1, **ONE_STEP},
}


def main() -> None:
    given = _given()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"The machine is busy (load {load:.1f}): numbers will be of little use.")
    everybody = PEERS | CLUSTERS
    chosen: dict[str, Contestant] = {name: everybody[name] for name in everybody if name in {LIMIT, *given.contestants}}
    if given.against:
        chosen["before"] = Fedlora([given.against.absolute(), "run"], tracked=True)
    found = {}
    for name in given.only:
        with tempfile.TemporaryDirectory(prefix="fedlora-bench-", ignore_cleanup_errors=True) as folder:
            os.environ["FEDLORA_HOME"] = str(Path(folder) / "home")
            work, changes = Path(folder) / "work", WORKLOADS[name]
            exported.write(configfile.load("demo", {**changes, "runner.device": "cpu"}, PRESETS), work)
            found[name] = compare(work, changes, chosen, given.repeats)
        print(f"\n{table(name, found[name])}", flush=True)
        if given.out:
            write_json(given.out.absolute(), {"machine": machine() | {"load": load}, "workloads": found})


def _given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_among(WORKLOADS), default=["W1", "W2"], help="workloads, with commas")
    parser.add_argument(
        "--contestants", type=_among(PEERS | CLUSTERS), default=list(PEERS), help="with commas; always the limit"
    )
    parser.add_argument("--repeats", type=int, default=3, help="executions of each (default: 3)")
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--against", type=Path, metavar="FEDLORA", help="the `fedlora` of another checkout")
    return parser.parse_args()


def _among(known: Mapping[str, Any]) -> Any:
    def names(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",")]
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return chosen

    return names


def compare(
    work: Path, changes: Mapping[str, Any], contestants: Mapping[str, Contestant], repeats: int
) -> dict[str, Any]:
    """What each contestant costs on a workload: every execution, versions, and how far it is from the limit.

    Raises:
        Void: one did other work.
    """
    done: dict[str, list[Done]] = {name: [] for name in contestants}
    far: dict[str, float] = {}
    for repeat in range(repeats + 1):
        of = changes if repeat else {**changes, "rounds": 1}
        for name in sorted(contestants, key=lambda name: name != LIMIT):  # with which the others are compared
            new = _executed(contestants[name], work.parent / name, repeat, work, of)
            if name == LIMIT and not repeat:
                limit = new.adapter
            far[name] = max(far.get(name, 0.0), check_same(name, new.adapter, limit))
            if repeat:
                done[name].append(new)
    return {
        name: {"packages": each[0].packages, "apart": far[name], "runs": [asdict(one.cost) for one in each]}
        for name, each in done.items()
    }


def _executed(contestant: Contestant, folder: Path, repeat: int, work: Path, changes: Mapping[str, Any]) -> Done:
    """One execution; one that fails is said, and done again once: hours of others shall not be lost by it."""
    try:
        return contestant.execute(folder / f"run{repeat}", work, changes)
    except Failed as error:
        print(f"{error}\n{folder.name} failed, and is done again", flush=True)
        return contestant.execute(folder / f"run{repeat}-again", work, changes)


def table(name: str, found: Mapping[str, Any]) -> str:
    """Medians in Markdown, with the least and the most."""
    costs = {who: [Cost(**run) for run in what["runs"]] for who, what in found.items()}
    best = statistics.median(cost.round for cost in costs[LIMIT])
    heads = [name, "start-up, s", "round, s", "of the limit's speed", "in all, s", "memory, MB"]
    fetched = any(cost.moved for some in costs.values() for cost in some)
    heads += ["fetched by a worker, MB"] * fetched
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for who, some in costs.items():
        share = best / statistics.median(cost.round for cost in some)
        cells = [
            middle([cost.start_up for cost in some], 1),
            middle([cost.round for cost in some], 2),
            f"{share:.0%}",
            middle([cost.total for cost in some], 1),
            middle([cost.memory for cost in some], 0),
        ]
        moved = [each for cost in some for each in cost.moved]
        cells += [middle(moved, 3) if moved else ""] * fetched
        lines.append(f"| {who} | {' | '.join(cells)} |")
    return "\n".join(lines)


def middle(values: Sequence[float], digits: int) -> str:
    """The median, and the least and the most where there are several."""
    words = f"{statistics.median(values):,.{digits}f}"
    return words if len(values) == 1 else f"{words} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def machine() -> dict[str, Any]:
    """Where it was measured."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
