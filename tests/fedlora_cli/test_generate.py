"""`fedlora generate`: what an adapter writes, and what the base alone does."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from fedlora.config import configfile
from fedlora.config.generate import GenerateConfig
from fedlora.data.turns import Turns
from fedlora.errors import AdapterError, ConfigError
from fedlora.exchange import inference
from fedlora.model import writing
from fedlora.model.arithmetic import DTYPES
from fedlora.run.loop import train
from fedlora_cli.app import app
from fedlora_cli.generate import adapter_of

PROMPT = "What is it?\n\na large animal with a long neck"


@pytest.fixture(scope="module")
def run(writing, shared):
    """A run whose adapter has learned how answers begin."""
    changes = {"strategy": "fedex-lora", "training.local_steps": 60, "rounds": 2, "training.batch_size": 8}
    return shared("generating", lambda path: train(configfile.build({**writing, **changes}), path))


def test_the_adapter_answers_in_form_and_the_base_does_not(run):
    found = inference.generate(run / "adapter", [PROMPT, PROMPT], GenerateConfig(max_new_tokens=8), with_base=True)
    assert found["adapter"][0].startswith("a kind of")
    assert found["adapter"][0] == found["adapter"][1]
    assert not found["base"][0].startswith("a kind of")


def test_an_adapter_is_asked_in_the_form_that_it_was_trained_in(writing, finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished({**writing, "data.chat_template": "chatml"}) / "adapter", tmp_path / "adapter")
    rendered = []
    asked = Turns.prompt
    monkeypatch.setattr(Turns, "prompt", lambda turns, said: rendered.append(asked(turns, said)) or rendered[-1])
    inference.generate(folder, ["Why?"], GenerateConfig(max_new_tokens=1))
    assert rendered == ["<s><|im_start|>user\nWhy?</s>\n<|im_start|>assistant\n"]
    told = json.loads((folder / "fedlora.json").read_text())
    (folder / "fedlora.json").write_text(json.dumps(told | {"chat_template": "{{ 1 }}"}))
    with pytest.raises(AdapterError, match="it names a chat template that is none of ours"):
        inference.generate(folder, ["Why?"])


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_it_is_computed_as_in_training(run, tmp_path, monkeypatch, dtype):
    folder = shutil.copytree(run / "adapter", tmp_path / "adapter")
    told = json.loads((folder / "fedlora.json").read_text())
    (folder / "fedlora.json").write_text(json.dumps(told | {"model": told["model"] | {"dtype": dtype}}))
    computed, write = [], writing.write

    def written(model, *rest):
        with model.autocast():
            computed.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        return write(model, *rest)

    monkeypatch.setattr(writing, "write", written)
    found = inference.generate(folder, [PROMPT], GenerateConfig(max_new_tokens=8))
    assert computed == [DTYPES[dtype]]
    assert found["adapter"][0].startswith("a kind of")


def test_draws_are_by_seed(run):
    how = GenerateConfig(max_new_tokens=12, temperature=2.0)
    one, same, other = (inference.generate(run / "adapter", [PROMPT], how, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


def test_what_the_command_prints(run):
    told = CliRunner().invoke(app, ["generate", str(run), PROMPT, "--with-base", "--max-new-tokens", "8"])
    assert told.exit_code == 0, told.output
    lines = told.stdout.splitlines()
    assert lines[0] == "prompt    What is it?"
    assert any(line.startswith("base      ") for line in lines)
    assert any(line.startswith("adapter   a kind of") for line in lines)


def test_a_run_means_its_adapter(run):
    assert adapter_of(str(run)) == run / "adapter" == adapter_of(str(run / "adapter"))


def test_what_writes_nothing_is_refused(finished):
    with pytest.raises(AdapterError, match="task=classification, which writes nothing"):
        inference.generate(finished() / "adapter", ["?"])


def test_a_run_that_is_under_way_has_no_adapter_yet(run, tmp_path, as_new):
    folder = as_new(run, tmp_path / "run").path
    for file in sorted((folder / "adapter").rglob("*"), reverse=True):
        file.unlink()
    (folder / "adapter").rmdir()
    with pytest.raises(ConfigError, match="has no adapter yet"):
        adapter_of(str(folder))
