"""A run that starts from an adapter that there is."""

import pytest
import torch

from fedlora.adapter import Adapter
from fedlora.config import configfile
from fedlora.errors import AdapterError, ConfigError
from fedlora.exchange.peftfolder import read_peft_folder
from fedlora.files.tensorfile import read_tensors
from fedlora.run import preflight, rounds
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder


@pytest.fixture(scope="module")
def old(finished):
    """A finished run to start from."""
    return finished({"strategy": "flora-na"})


@pytest.fixture(scope="module")
def changed(finished):
    """One whose strategy changed the base, too."""
    return finished({"strategy": "fedex-lora"})


def begun(config, path):
    train(config, path)
    return RunFolder(path)


def test_it_begins_where_the_other_has_ended(old, configure, tmp_path):
    run = begun(configure({"lora.init": str(old), "seed": 0}), tmp_path / "run")
    mine, theirs = run.read_state(0).adapter.tensors(), read_peft_folder(old / "adapter").tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    before, after = rounds.records(RunFolder(old))[-1], rounds.records(run)[0]
    assert after.metrics["global/accuracy"] == before.metrics["global/accuracy"]
    assert after.metrics["global/loss"] == pytest.approx(before.metrics["global/loss"], rel=1e-6)


def test_an_update_of_the_base_comes_along(changed, configure, tmp_path):
    run = begun(configure({"lora.init": str(changed / "adapter")}), tmp_path / "run")
    assert (
        run.read_state(0).base.tensors().keys() == read_tensors(changed / "adapter" / "base_delta.safetensors").keys()
    )
    before, after = rounds.records(RunFolder(changed))[-1], rounds.records(run)[0]
    assert after.metrics["global/loss"] == pytest.approx(before.metrics["global/loss"], rel=1e-5)


def test_a_decoder_goes_on_too(writing, shared, tmp_path):
    first = shared("writing-flora-na", lambda path: train(configfile.build({**writing, "strategy": "flora-na"}), path))
    run = begun(
        configfile.build({**writing, "strategy": "svd", "lora.init": str(first), "rounds": 1}), tmp_path / "run"
    )
    before, after = rounds.records(RunFolder(first))[-1], rounds.records(run)[0]
    assert after.metrics["global/loss"] == pytest.approx(before.metrics["global/loss"], rel=1e-6)


REFUSED = [
    ({"lora.rank": 4}, ConfigError, "has rank 8, and lora.rank is 4"),
    ({"lora.alpha": 32}, ConfigError, r"has scaling 2, and lora.alpha=32 .* gives 4; set lora.alpha=16"),
    ({"lora.variant": "dora"}, ConfigError, "is an adapter of lora.variant=lora, and dora is set"),
    ({"model.name": "minilm"}, ConfigError, "is an adapter for bert-tiny, and model.name is minilm"),
    ({"strategy": "fed-sb"}, ConfigError, "strategy=fed-sb trains a matrix between factors of its own"),
    ({"lora.init": "nowhere"}, ConfigError, "lora.init=nowhere: no adapter there; expected a folder"),
    ({"lora.init": "models:/x@champion"}, ConfigError, "is looked up by `fedlora run`"),
]


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_does_not_fit_is_refused_before_a_run(old, configure, changes, error, words):
    with pytest.raises(error, match=words):
        preflight.names(configure({"lora.init": str(old), **changes}))


def test_another_head_is_refused_before_training(old, configure, tmp_path):
    data = tmp_path / "two.csv"
    data.write_text("text,label\n" + "".join(f"some words {i},{'ab'[i % 2]}\n" for i in range(80)))
    changes = {"data.name": str(data), "data.train_size": None, "data.test_size": None, "partition.name": "iid"}
    with pytest.raises(AdapterError, match=r"has a head for the labels .*, and the data has a, b"):
        train(configure({"lora.init": str(old), **changes}), tmp_path / "run")
    assert not (tmp_path / "run" / "rounds" / "000" / "state.json").exists()


def test_other_modules_are_refused_before_training(old, configure, tmp_path):
    with pytest.raises(AdapterError, match=r"lora.init=.*"):
        train(configure({"lora.init": str(old), "lora.target_modules": ["query"]}), tmp_path / "run")


def test_it_is_part_of_what_decides_the_numbers(old, configure):
    assert configure({"lora.init": str(old)}).digest() != configure().digest()
    assert isinstance(read_peft_folder(old / "adapter"), Adapter)
