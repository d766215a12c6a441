"""Kills runs at random moments, continues them, and compares what they leave with a run that nobody touched.

    .venv/bin/python benchmarks/chaos.py [--kills 30] [--seed 0] [--out docs/data/chaos.json]

Every family of strategies is run once without interruption, as a plain loop, and once by `fedlora run`, which is ended
again and again: by SIGKILL, SIGINT or SIGTERM to its whole process group, at a random moment of a phase that is drawn,
and continued with `fedlora resume`. In the end the final adapter, the last state, every metric (but wall times), the
points in MLflow and the run's status there must be the same, and no process may be left.

    .venv/bin/python benchmarks/chaos.py --served --out docs/data/chaos-served.json

does it under `fedlora up`: the flow's process is killed, and then the worker with its flow; both times the run must
become `Crashed` in Prefect, and `prefect flow-run retry` must continue it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from deployments.shipped import PRESETS
from fedlora import metrics
from fedlora.config import configfile
from fedlora.metrics import FINAL
from fedlora.run import loop, rounds
from fedlora.run.runfolder import RunFolder

TINY: dict[str, Any] = {
    "model.name": "bert-tiny",
    "data.name": "wordnet-nouns",
    "data.train_size": 400,
    "data.test_size": 120,
    "data.max_length": 16,
    "clients": 4,
    "rounds": 4,
    "training.local_steps": 3,
    "training.batch_size": 8,
    "partition.min_size": 2,
    "runner.slots": 2,
    "runner.device": "cpu",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "factor means": {"strategy": "fedit", "channel.faults.crash": 0.2, "channel.faults.corrupt": 0.2},
    "base updates": {"strategy": "flora"},
    "alternating": {"strategy": "rolora"},
    "personal": {"strategy": "fedsa-lora"},
    "mixed ranks": {"strategy": "replication", "lora.ranks": [2, 4, 8, 8]},
}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
"""Drawn from: a process that is killed can tidy nothing up, so that is the harder test."""
_PATIENCE_S = 600
_CLEAN_STOP_S = 30


def _latest(folder: Path) -> Path:
    return max((folder / "rounds").glob("[0-9]*"), default=folder / "rounds" / "000")


def _logged(folder: Path) -> int:
    return int((RunFolder(folder).read_json("tracking.json") or {"logged": -1})["logged"])


PHASES: dict[str, Callable[[Path], bool]] = {
    "partitioning": lambda run: (run / "run.json").exists() and not (run / "partition.json").exists(),
    "training": lambda run: int(_latest(run).name) > 0 and not (_latest(run) / "roll.json").exists(),
    "aggregation": lambda run: (_latest(run) / "roll.json").exists() and not (_latest(run) / "state.json").exists(),
    "saving": lambda run: any(_latest(run).glob(".*.tmp")),
    "evaluation": lambda run: (_latest(run) / "state.json").exists() and not (_latest(run) / "record.json").exists(),
    "tracking": lambda run: (_latest(run) / "record.json").exists() and _logged(run) < int(_latest(run).name),
    "export": lambda run: (run / "adapter").exists(),
}
"""Whether a run is in a phase, as its folder shows it."""


@dataclass(frozen=True)
class Kill:
    """One interruption: what was sent, when, and how long it took until no process was left."""

    family: str
    signal: str
    phase: str
    after_s: float
    rounds_done: int
    ended_s: float


def fedlora(home: Path, *words: str) -> psutil.Popen:
    """The command line in a process group of its own, which takes Ctrl-C as a terminal would send it."""
    with (home / "output.log").open("ab") as output:
        return psutil.Popen(
            [sys.executable, "-m", "fedlora_cli", *words],
            env=_environment(home),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


def _environment(home: Path) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    return environ | {"FEDLORA_HOME": str(home), "PYTHONUNBUFFERED": "1"}


def interrupt(
    process: psutil.Popen, folder: Path, family: str, phases: Sequence[str], draw: random.Random
) -> Kill | None:
    """End a run in one of these phases; None where it ended before it came to that phase again."""
    phase, number, delay = draw.choice(phases), draw.choice(SIGNALS), draw.uniform(0, 0.25)
    begun = time.monotonic()
    while not (_under_way(folder, process) and PHASES[phase](folder)):
        if process.poll() is not None:
            return None
        if time.monotonic() > begun + _PATIENCE_S:
            raise SystemExit(f"{family}: nothing happens in {folder}")
        time.sleep(0.001)
    time.sleep(delay)
    members = [process, *process.children(recursive=True)]
    sent = time.monotonic()
    os.killpg(process.pid, number)
    _, left = psutil.wait_procs(members, timeout=_CLEAN_STOP_S)
    if left:
        raise SystemExit(f"{family}: {len(left)} processes outlive {number.name} in {phase}: {left}")
    done = len(RunFolder(folder).finished_rounds())
    return Kill(family, number.name, phase, round(sent - begun, 2), done, round(time.monotonic() - sent, 2))


def _under_way(folder: Path, process: psutil.Popen) -> bool:
    """Whether the process has come to the run itself: it holds the folder."""
    lock = folder / "lock"
    return lock.exists() and lock.read_text() == f"process {process.pid}"


def outcome(folder: Path) -> dict[str, Any]:
    """All that an interruption must not change."""
    files = [*sorted((folder / "adapter").rglob("*.safetensors")), _latest(folder) / "state.safetensors"]
    records = rounds.records(RunFolder(folder))
    return {
        "adapters and state": {
            str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
        },
        "metrics": [metrics.reproducible(record.metrics) for record in records],
        "clients": [record.clients for record in records],
    }


def expected(changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The outcome of the run as a plain loop in this process, without an interruption."""
    plain = {**TINY, **changes, "runner.kind": "threads", "runner.slots": None}
    loop.train(configfile.load("demo", plain, PRESETS), folder)
    return outcome(folder)


def points(home: Path, folder: Path) -> dict[str, Any]:
    """What MLflow has of a run: how many runs there are of it, its status, and the steps of every metric."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{home / 'mlflow.db'}"
    client = MlflowClient(uri)
    experiments = [each.experiment_id for each in client.search_experiments()]
    found = client.search_runs(experiments, f"tags.`fedlora.run` = '{RunFolder(folder).id}'")
    names = [name for run in found for name in run.data.metrics if not name.startswith(FINAL)]
    history = {name: client.get_metric_history(found[0].info.run_id, name) for name in names}
    return {
        "runs": len(found),
        "status": [run.info.status for run in found],
        "values": {name: {point.step: point.value for point in known} for name, known in history.items()},
        "twice": [name for name, known in history.items() if len({point.step for point in known}) < len(known)],
    }


def faults(home: Path, folder: Path, wanted: Mapping[str, Any]) -> list[str]:
    """What differs from the run that nobody touched, in words; empty where nothing does."""
    mine, logged = outcome(folder), points(home, folder)
    found = [f"{name} differ" for name in wanted if mine[name] != wanted[name]]
    if logged["runs"] != 1 or logged["status"] != ["FINISHED"]:
        found.append(f"MLflow has {logged['runs']} runs, {logged['status']}")
    if logged["twice"]:
        found.append(f"points were logged twice: {logged['twice']}")
    for number, values in enumerate(wanted["metrics"]):
        lost = [name for name, value in values.items() if logged["values"].get(name, {}).get(number) != value]
        found += [f"MLflow lacks {name} of round {number}" for name in lost]
    found += [f"{path} was left behind" for path in folder.rglob(".*.tmp")]
    return found


def torment(home: Path, family: str, kills: int, draw: random.Random) -> tuple[list[Kill], list[str]]:
    """Run one family with this many interruptions; what they were, and what differs in the end."""
    changes = FAMILIES[family]
    name = family.replace(" ", "-")
    wanted = expected(changes, home / f"{name}-untouched")
    folder = home / name
    done: list[Kill] = []
    words = [f"{key}={json.dumps(value)}" for key, value in {**TINY, **changes}.items()]
    process = fedlora(home, "run", "demo", *words, "--run-dir", str(folder))
    while len(done) < kills:
        phases = [name for name in PHASES if name not in ("partitioning", "export")]
        if not done:  # some come once in a run: half of the first and last kills are theirs
            phases = draw.choice([["partitioning"], phases])
        elif len(done) == kills - 1:
            phases = draw.choice([["export"], phases])
        kill = interrupt(process, folder, family, phases, draw)
        if kill is None:  # complete before it could be killed often enough
            break
        done.append(kill)
        print(json.dumps(asdict(kill)), flush=True)
        process = fedlora(home, "resume", str(folder))
    if process.wait(_PATIENCE_S) != 0:
        raise SystemExit(f"{family}: a run that was continued ended with {process.returncode}; see {home}/output.log")
    return done, faults(home, folder, wanted)


def chaos(home: Path, kills: int, seed: int, families: Sequence[str]) -> dict[str, Any]:
    """All families, one after the other, with the kills shared out among them."""
    draw = random.Random(seed)
    every: list[Kill] = []
    wrong: dict[str, list[str]] = {}
    for index, family in enumerate(families):
        share = kills // len(families) + (index < kills % len(families))
        done, found = torment(home, family, share, draw)
        every += done
        wrong[family] = found
        print(f"{family}: {len(done)} kills, {found or 'the same as without'}", flush=True)
    return {"seed": seed, "kills": [asdict(kill) for kill in every], "wrong": wrong}


def served(home: Path) -> dict[str, Any]:
    """A run of a deployment whose flow is killed, and then its worker and its flow together; each time retried."""
    changes = {**TINY, **FAMILIES["factor means"], "rounds": 30}
    wanted = expected(changes, home / "untouched")
    folder, kills = home / "served", []
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        ports = [str(probe.getsockname()[1]) for probe in (first, second)]
    up = ("up", "--prefect-port", ports[0], "--mlflow-port", ports[1])
    _call(home, *up)
    try:
        api = f"http://127.0.0.1:{ports[0]}/api"
        deployment = httpx.get(f"{api}/deployments/name/federated/custom").raise_for_status().json()["id"]
        parameters = {"overrides": changes, "run_dir": str(folder)}
        created = httpx.post(f"{api}/deployments/{deployment}/create_flow_run", json={"parameters": parameters})
        run = created.raise_for_status().json()["id"]
        for victim in ("flow", "worker and flow"):
            _until(partial(_has_closed, folder, len(RunFolder(folder).finished_rounds()) + 3))
            begun = time.monotonic()
            _kill_served(home, folder, victim)
            _until(lambda: _state(api, run) == "CRASHED")
            kills.append({"killed": victim, "crashed_after_s": round(time.monotonic() - begun, 1)})
            print(json.dumps(kills[-1]), flush=True)
            _call(home, *up)  # a worker that is gone is replaced
            retry = [sys.executable, "-m", "prefect", "flow-run", "retry", run]
            subprocess.run(retry, env=_environment(home) | {"PREFECT_API_URL": api}, check=True)
        _until(lambda: _state(api, run) == "COMPLETED")
        return {"kills": kills, "wrong": {"served": faults(home, folder, wanted)}}
    finally:
        _call(home, "down")


def _call(home: Path, *words: str) -> None:
    if fedlora(home, *words).wait(_PATIENCE_S) != 0:
        raise SystemExit(f"fedlora {words[0]} failed; see {home}/output.log")


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("nothing happens")
        time.sleep(0.2)


def _has_closed(folder: Path, number: int) -> bool:
    return len(RunFolder(folder).finished_rounds()) >= number


def _state(api: str, run: str) -> str:
    return str(httpx.get(f"{api}/flow_runs/{run}", timeout=30).json()["state"]["type"])


def _kill_served(home: Path, folder: Path, victim: str) -> None:
    """SIGKILL to the process that holds the folder and all it started; or to the worker above it too."""
    flow = psutil.Process(int((folder / "lock").read_text().removeprefix("process ")))
    recorded = json.loads((home / "services.json").read_text())["processes"]["worker"][0]
    root = psutil.Process(recorded) if victim == "worker and flow" else flow
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=30)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    arguments.add_argument("--served", action="store_true", help="under `fedlora up`, killed twice, instead")
    arguments.add_argument("--out", type=Path, help="where the kills and what came of them are written, as JSON")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedlora-chaos-") as home:
        folder = Path(home)
        found = served(folder) if given.served else chaos(folder, given.kills, given.seed, given.families)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    if any(found["wrong"].values()):
        raise SystemExit(f"differs: {found['wrong']}")


if __name__ == "__main__":
    main()
