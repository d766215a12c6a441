"""A quiet, offline machine with a home of its own, and the smallest run that still does everything."""

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["FEDLORA_HOME"] = _home = tempfile.mkdtemp(prefix="fedlora-tests-")
os.environ["SSL_CERT_FILE"] = os.path.join(_home, "authority.pem")

import gc
import hashlib
import json
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import certifi
import pytest
from filelock import FileLock
from PIL import Image
from xdist.scheduler import LoadFileScheduling

from fedlora.errors import saving

# Each client of Prefect's reads the authorities of the world, 25 ms of processor time. Nobody is asked here who has a
# certificate: of all of them, one will do.
_first, _end, _ = Path(certifi.where()).read_text("utf-8").partition("-----END CERTIFICATE-----")
Path(os.environ["SSL_CERT_FILE"]).write_text(_first + _end, "utf-8")

pytest_plugins = ["pipeline"]


FIRST = (
    "local/test_services",
    "local/test_automations",
    "local/test_stopping",
    "local/test_registering",
    "tasks/test_clusters",
    "test_chaos",
    "tasks/test_outages",
    "flows/test_federated",
    "fedlora_cli/test_run.py",
    "flows/test_sweep",
    "tests/deployments/",
    "tests/fedlora_cli/",
    "tests/flows/",
    "fedlora/run/test_resume",
    "fedlora/run/test_loop",
)
"""Files of minutes begin first, so that all workers end together (with xdist's `--no-loadscope-reorder`)."""
TOGETHER = FIRST[:3]
"""Files that one worker gets: they look at the same servers, one after the other."""


def pytest_collectstart():
    """In processes that run tests: the one that hands them out is not held up by imports of seconds."""
    import torch

    from fedlora.model import peftlibrary

    torch.set_num_threads(1)
    peftlibrary.load()  # before test modules do it: without torch's compiler, which takes three seconds


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: next((n for n, name in enumerate(FIRST) if name in str(item.path)), len(FIRST)))


def pytest_collection_finish():
    gc.freeze()  # what the imports made stays: a test that collects looks at its own objects, not at a million others


class ByFiles(LoadFileScheduling):
    """xdist's `--dist loadfile`, with some files together."""

    def _split_scope(self, nodeid):
        return TOGETHER[0] if any(name in nodeid for name in TOGETHER) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ByFiles(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def forgotten():
    """What a run scored before training is not there for the next test: it shall not depend on which others ran."""
    yield
    shutil.rmtree(os.path.join(_home, "cache", "before"), ignore_errors=True)


def pytest_unconfigure():
    shutil.rmtree(_home, ignore_errors=True)


TINY = {
    "model.name": "bert-tiny",
    "data.name": "wordnet-nouns",
    "data.train_size": 400,
    "data.test_size": 60,
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
    """`with drawn():` figures are drawn. Elsewhere one pixel stands in: drawing is more than half of a tiny run."""
    from fedlora.data import picture
    from fedlora.report import plots

    figures = ((picture, "draw"), (plots, "rounds_figure"), (plots, "conditions_figure"))
    real = {place: getattr(*place) for place in figures}

    def put(functions):
        for place, function in functions.items():
            setattr(*place, function)

    @contextmanager
    def really():
        put(real)
        yield
        put(dict.fromkeys(figures, _one_pixel))

    put(dict.fromkeys(figures, _one_pixel))
    yield really
    put(real)


def _one_pixel(what, path, *how, **more):
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
    from fedlora.config import configfile

    return lambda changes=None: configfile.build({**tiny, **(changes or {})})


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """`shared(name, make)`: a path that `make(path)` fills, once for all workers of a session."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent

    def path(name, make):
        with FileLock(place / f"{name}.lock"):
            if not (place / f"{name}.made").exists():
                make(place / name)
                (place / f"{name}.made").touch()
        return place / name

    return path


@pytest.fixture(scope="session")
def finished(configure, shared):
    """`finished({"strategy": "svd"})`: the folder of that tiny run, trained once a session. Not to be written to."""
    from fedlora.run.loop import train

    def folder(changes=None):
        key = hashlib.sha256(json.dumps(changes or {}, sort_keys=True).encode()).hexdigest()[:16]
        return shared(f"finished-{key}", lambda path: train(configure(changes), path))

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
    import torch
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
def small_llama(shared):
    """The folder of a Llama of 0.1 M parameters with a tokenizer of its own, made from the packaged texts; untrained.

    It has no chat template.
    """

    def make(path):
        import torch
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        from fedlora.config import DataConfig
        from fedlora.data import sources

        words = Tokenizer(models.BPE())
        words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        special, letters = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
        made = trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=letters, show_progress=False
        )
        words.train_from_iterator(
            sources.load(DataConfig(train_size=2000), 0).tables["train"]["text"].to_pylist(), made
        )
        names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(path)
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 600}
        shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(path)

    return lambda: shared("small-llama", make)


@pytest.fixture(scope="session")
def wide_llama(small_llama, shared):
    """As the small Llama, of widths that 4 bits on a CPU can do with."""

    def make(path):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        tokenizer, config = AutoTokenizer.from_pretrained(small_llama()), AutoConfig.from_pretrained(small_llama())
        config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        tokenizer.save_pretrained(path)

    return lambda: shared("wide-llama", make)


@pytest.fixture(scope="session")
def kinds(shared):
    """A jsonl file of 120 tasks in Alpaca's columns, with a column `kind` of three values: what is it that is told?"""

    def make(path):
        from fedlora.config import DataConfig
        from fedlora.data import sources

        table = sources.load(DataConfig(train_size=2000), 0)
        names, rows = table.labels, table.tables["train"].to_pylist()
        chosen = [row for row in rows if names[row["label"]] in ("animal", "plant", "person")][:120]
        tasks = [
            {"instruction": "What is it?", "input": row["text"], "output": f"a kind of {names[row['label']]}",
             "kind": names[row["label"]]} for row in chosen
        ]  # fmt: skip
        path.write_text("".join(f"{json.dumps(task)}\n" for task in tasks))

    return lambda: shared("kinds.jsonl", make)


@pytest.fixture(scope="session")
def writing(tiny, small_llama, kinds):
    """Dotted overrides for the tiny run as one of a decoder that is tuned on instructions."""
    return {
        **tiny,
        "task": "generation",
        "model.name": str(small_llama()),
        "data.name": str(kinds()),
        "data.max_length": 96,
        "data.train_size": None,
        "data.test_size": None,
        "partition.by": "kind",
        "training.learning_rate": 0.02,
        "training.local_steps": 4,
    }


@pytest.fixture(scope="session")
def with_databases(shared):
    """`with_databases(folder)`: the folder as a home that has been used: with databases of this version, empty.

    Prefect's server makes them in ten seconds, MLflow in two.
    """

    def copy(folder, *names):
        for name in names or DATABASES:
            shutil.copy(shared(name, DATABASES[name]), folder)
        return folder

    return copy


def _of_prefect(file):
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{file}"
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    subprocess.run(command, env=environ, check=True, capture_output=True, timeout=240)


def _of_mlflow(file):
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{file}").search_experiments()


DATABASES = {"prefect.db": _of_prefect, "mlflow.db": _of_mlflow}
