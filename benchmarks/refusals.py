"""How long a mistake takes to be told, and what it leaves behind: seconds beyond the imports, each in a new home.

    .venv/bin/python benchmarks/refusals.py [--out docs/data/refusals.json]

Everything that a check may import is imported first; every mistake is then made in a process of its own that knows
nothing of the others (a fork), in an empty home, as `fedlora run`, `fedlora sweep` or `fedlora up` would check it.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(tempfile.mkdtemp(prefix="fedlora-bench-"))
os.environ["FEDLORA_HOME"] = str(ROOT / "home")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("PREFECT_API_URL", None)

import datasets  # noqa: F401 (as everything below: so that no check has to import it)
import peft  # noqa: F401
import requests  # noqa: F401
import torch
import transformers.models.bert.modeling_bert  # noqa: F401
from mlflow import MlflowClient
from transformers import AutoModel, AutoTokenizer, BertConfig

from deployments.local import registering as deploying
from deployments.shipped import PRESETS, SWEEPS
from fedlora.config import configfile
from fedlora.data import columns, partition, sources, survey  # noqa: F401
from fedlora.errors import FedloraError
from fedlora.files import home
from fedlora.model import resolve
from fedlora.run import preflight, runfolder  # noqa: F401
from fedlora.sweep import plan as sweeps
from fedlora.training import workers  # noqa: F401
from flows import checks

Try = Callable[[], object]


def run(*words: str) -> Try:
    """What `fedlora run demo WORDS` looks at."""

    def check() -> object:
        config = configfile.load("demo", configfile.absolute_paths(configfile.parse_overrides(words)), PRESETS)
        return checks.before_start(config, home.runs() / "run")

    return check


def sweep(source: str, *words: str) -> Try:
    """What `fedlora sweep SOURCE WORDS` looks at."""
    return lambda: checks.of_sweep(sweeps.load(source, configfile.parse_overrides(words), PRESETS, SWEEPS))


def deployment(parameters: dict[str, Any]) -> Try:
    """What `fedlora up` looks at, with a deployment of these parameters."""

    def check() -> None:
        folder = ROOT / "source" / "deployments"
        shutil.copytree(PRESETS, folder / "presets", dirs_exist_ok=True)
        declared = {"name": "mine", "entrypoint": "flows/federated.py:federated", "parameters": parameters}
        (folder / "prefect.yaml").write_text(json.dumps({"deployments": [declared]}))
        deploying.check_source(folder.parent)

    return check


def mistakes() -> dict[str, Try]:
    """By what is wrong."""
    data = f"data.name={write_table()}"
    return {
        "nothing: the demo": run(),
        "column of the text": run(data, "data.text=body"),
        "column of the label": run(data, "data.label=topic"),
        "one class": run(data, "data.label=same"),
        "every label another": run(data, "data.label=text"),
        "owners against clients": run(data, "partition.name=natural-id", "data.client=owner"),
        "partition.min_size": run("partition.min_size=700", "partition.alpha=0.1"),
        "clients against examples": run("clients=900"),
        "rank against module sides": run("lora.rank=200"),
        "target modules that match nothing": run("lora.target_modules=quarry"),
        "tokenizer beyond the embedding": run(data, f"model.name={write_model()}"),
        "experiment that was deleted": run(f"tracking.uri={write_store()}", "tracking.experiment=gone"),
        "preset that is not there": lambda: configfile.load("deom", {}, PRESETS),
        "sweep file that is not there": sweep("nope.yaml"),
        "sweep of three, all wrong": sweep("demo", "lora.rank=200"),
        "preset of a deployment": deployment({"preset": "deom"}),
    }


def write_table() -> Path:
    """80,000 rows of text, as a csv file of some megabytes."""
    path = ROOT / "mine.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "same", "owner"])
        words = "what is said here does not matter but its length does".split()  # noqa: SIM905
        writer.writerows(
            (f"{' '.join(words)} {row}", f"kind {row % 20}", "one", f"owner {row % 6}") for row in range(80_000)
        )
    return path


def write_model() -> Path:
    """BERT-Tiny's tokenizer on a model with fewer rows."""
    folder = ROOT / "model"
    config = BertConfig(vocab_size=30_000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2)
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("bert-tiny")).save_pretrained(folder)
    return folder


def write_store() -> str:
    """A store with an experiment `gone` that was deleted."""
    uri = f"sqlite:///{ROOT / 'mlflow.db'}"
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("gone"))
    return uri


def measure(check: Try) -> dict[str, Any]:
    """Make a mistake in a fork of this process; seconds, what is said, and what is in the home afterwards."""
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(check, queue))
    child.start()
    found: dict[str, Any] = queue.get()
    child.join()
    return found


def _in_child(check: Try, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ["FEDLORA_HOME"] = tempfile.mkdtemp(prefix="home-", dir=ROOT)
    begun = time.perf_counter()
    try:
        found = check()
        said = found.line() if isinstance(found, preflight.Found) else "nothing was said"
    except FedloraError as error:
        said = str(error)
    seconds = time.perf_counter() - begun
    left = sorted(path.name for path in home.home().iterdir() if path != home.cache())
    queue.put({"seconds": round(seconds, 3), "left": left, "said": said.replace(str(ROOT), "…")})


def main() -> None:
    """Measure and print a row per mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("refusals.json"))
    arguments = parser.parse_args()
    results = {}
    try:
        for name, check in mistakes().items():
            results[name] = found = measure(check)
            print(f"{name:<36} {found['seconds']:6.2f} s  left: {', '.join(found['left']) or 'nothing'}", flush=True)
    finally:
        shutil.rmtree(ROOT, ignore_errors=True)
    arguments.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
