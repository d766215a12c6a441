"""What a run writes down about its base model, and that it does not go on with another one."""

import shutil

import pytest

from fedlora.config import ModelConfig
from fedlora.errors import ModelError
from fedlora.exchange.inference import description
from fedlora.model import base as model
from fedlora.model import provenance
from fedlora.run.jobs import prepare_data
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder
from fedlora.training.workers import Workbench

COMMIT, LATER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def own_model(tmp_path):
    """A folder with the packaged model's files, to be changed."""
    return shutil.copytree(model.resolve("bert-tiny"), tmp_path / "own")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(commit)`: a hub cache in which main of `some/bert` is at a commit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--bert"

    def at(commit):
        shutil.copytree(model.resolve("bert-tiny"), repository / "snapshots" / commit, dirs_exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        return ModelConfig(name="some/bert", pooling="mean")

    return at


def digest(folder):
    return provenance.of_model(ModelConfig(name=str(folder)))["digest"]


def test_a_folder_has_a_digest_of_what_is_read_from_it(own_model):
    before = digest(own_model)
    assert digest(own_model) == before == digest(model.resolve("bert-tiny"))
    (own_model / "README.md").write_text("other words")
    assert digest(own_model) == before
    weights = own_model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # same size
    weights.write_bytes(content)
    assert digest(own_model) != before
    weights.unlink()
    assert digest(own_model) != before


def test_a_hub_id_has_the_commit_it_stood_for(hub):
    config = hub(COMMIT)
    origin = provenance.of_model(config)
    assert origin == {"name": "some/bert", "hub": "some/bert", "revision": COMMIT}
    hub(LATER)
    assert provenance.of_model(config)["revision"] == LATER
    assert provenance.of_model(provenance.pinned(config, origin))["revision"] == COMMIT
    provenance.check(config, origin)  # goes on with the commit of the beginning, wherever the branch is
    assert model.load_tokenizer(provenance.pinned(config, origin))
    with pytest.raises(ModelError, match=r"model\.name=no/such: .*cannot be reached"):
        provenance.of_model(ModelConfig(name="no/such"))


def test_the_run_folder_and_the_adapter_say_which_model_and_data(finished):
    run = RunFolder(finished())
    setup = run.need_json("setup.json")
    assert setup["model"] == {"name": "bert-tiny", "digest": digest(model.resolve("bert-tiny"))}
    assert description(run.path / "adapter")[1]["provenance"] == {"model": setup["model"], "data": setup["data"]}
    assert provenance.tags(setup["model"]) == {"model.digest": setup["model"]["digest"]}


def test_a_run_does_not_go_on_with_a_model_that_changed(configure, own_model, tmp_path):
    config = configure({"model.name": str(own_model), "model.pooling": "mean", "rounds": 1})
    run = train(config, tmp_path / "run")
    bench = Workbench("cpu")
    prepare_data(bench, tmp_path / "run")
    tokenizer = own_model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(ModelError, match=r"no longer what the run began with .*another --run-dir"):
        prepare_data(bench, tmp_path / "run")
    assert run
