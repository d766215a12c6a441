"""A quiet, offline machine with a home of its own, and the smallest run that still does everything."""

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["FEDLORA_HOME"] = _home = tempfile.mkdtemp(prefix="fedlora-tests-")

import json
import subprocess
import sys
import uuid
from contextlib import contextmanager

import pytest
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image

from fedlora.config import configfile

torch.set_num_threads(1)

pytest_plugins = ["pipeline"]


FIRST = (
    "test_chaos",
    "fedlora_cli/test_run.py",
    "local/test_services",
    "tasks/test_outages",
    "flows/test_federated",
    "local/test_registering",
    "flows/test_sweep",
    "local/test_automations",
    "tests/deployments/",
    "tests/fedlora_cli/",
    "tests/flows/",
    "fedlora/run/test_resume",
    "fedlora/run/test_loop",
)
"""Files of minutes begin first, so that two workers end together (with xdist's `--no-loadscope-reorder`)."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((n for n, name in enumerate(FIRST) if name in str(item.path)), len(FIRST)))


def pytest_unconfigure():
    shutil.rmtree(_home, ignore_errors=True)


TINY = {
    "model.name": "bert-tiny",
    "data.name": "wordnet-nouns",
    "data.train_size": 400,
    "data.test_size": 120,
    "data.max_length": 16,
    "clients": 3,
    "rounds": 2,
    "training.local_steps": 2,
    "training.batch_size": 8,
    "partition.min_size": 2,
    "keep_rounds": None,
    "runner.kind": "threads",
    "runner.device": "cpu",
}


@pytest.fixture(scope="session", autouse=True)
def drawn():
    """`with drawn():` figures are drawn. Elsewhere one pixel stands in: drawing is half the time of a tiny run."""
    real = Figure.savefig

    @contextmanager
    def really():
        Figure.savefig = real
        yield
        Figure.savefig = _one_pixel

    Figure.savefig = _one_pixel
    yield really
    Figure.savefig = real


def _one_pixel(figure, path, **settings):
    Image.new("RGB", (1, 1)).save(path, format="png")


@pytest.fixture
def pictures(drawn):
    """For a test that looks at figures."""
    with drawn():
        yield


@pytest.fixture(scope="session")
def tiny() -> dict:
    """Dotted overrides for a run of well under a second."""
    return dict(TINY)


@pytest.fixture(scope="session")
def configure(tiny):
    """`configure({"strategy": "svd"})`: the tiny run with changes, as a `RunConfig`."""
    return lambda changes=None: configfile.build({**tiny, **(changes or {})})


@pytest.fixture(scope="session")
def finished(configure, tmp_path_factory):
    """`finished({"strategy": "svd"})`: the folder of that tiny run, trained once a session. Not to be written to."""
    from fedlora.run.loop import train

    folders = {}

    def folder(changes=None):
        key = json.dumps(changes or {}, sort_keys=True)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("finished") / "run"
            train(configure(changes), folders[key])
        return folders[key]

    return folder


@pytest.fixture(scope="session")
def as_new():
    """`as_new(folder, to)`: a copy of a run's folder that is a run of its own, so that MLflow does not know it."""
    from fedlora.run.runfolder import RunFolder

    def copy(folder, to):
        run = RunFolder(shutil.copytree(folder, to))
        run.write_json("run.json", {**run.read_json("run.json"), "id": uuid.uuid4().hex})
        return run

    return copy


@pytest.fixture(scope="session")
def small_bert(tmp_path_factory):
    """`small_bert(dropout)`: the folder of a random BERT of 16 hidden units, without tokenizer."""
    from transformers import AutoModel, BertConfig

    def folder(dropout=0.1):
        path = tmp_path_factory.mktemp("bert")
        torch.manual_seed(5)
        config = BertConfig(
            vocab_size=99,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=40,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        AutoModel.from_config(config).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session")
def with_databases(tmp_path_factory):
    """`with_databases(folder)`: the folder as a home that has been used: with databases of this version, empty.

    Prefect's server makes them in ten seconds, MLflow in two; once for all workers of a session.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    made = shared / "databases"

    def copy(folder):
        with FileLock(shared / "databases.lock"):
            if not made.exists():
                _make_databases(shared / "databases-begun")
                (shared / "databases-begun").rename(made)
        for file in made.iterdir():
            shutil.copy(file, folder)
        return folder

    return copy


def _make_databases(folder):
    from mlflow import MlflowClient

    folder.mkdir()
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{folder / 'prefect.db'}"
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    subprocess.run(command, env=environ, check=True, capture_output=True, timeout=240)
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
