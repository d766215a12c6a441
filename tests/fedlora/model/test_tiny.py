"""The packaged decoder: small, loadable, and what it writes has the form of what it has seen."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedlora.config import DataConfig, ModelConfig
from fedlora.config.generate import GenerateConfig
from fedlora.config.lora import LoraConfig
from fedlora.data.turns import Turns
from fedlora.model import tiny, writing
from fedlora.model.base import load_tokenizer
from fedlora.model.known import KNOWN
from fedlora.model.resident import ResidentModel
from fedlora.objective.generation import OBJECTIVE


def test_it_is_small():
    files = list(KNOWN["llama-tiny"].shipped().iterdir())
    assert sum(file.stat().st_size for file in files) < 4e6
    network = AutoModelForCausalLM.from_pretrained(KNOWN["llama-tiny"].location())
    assert sum(each.numel() for each in network.parameters()) < 2e6


def test_it_writes_a_definition_and_ends_it():
    config = ModelConfig(name="llama-tiny")
    tokenizer = load_tokenizer(config)
    model = ResidentModel.build(OBJECTIVE, config, LoraConfig(rank=2), [], 0, 0, torch.device("cpu"))
    nouns = ("dog", "hammer", "river", "anger")
    prompts = [Turns(tokenizer, 64).prompt([{"role": "user", "content": f"Define the noun: {noun}"}]) for noun in nouns]
    asked = [np.array(ids, dtype=np.int32) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    how = GenerateConfig(max_new_tokens=40)
    answers = writing.write(model, asked, how, writing.Marks.of(model.peft, tokenizer))
    texts = tokenizer.batch_decode(answers)
    assert all(0 < len(each) < 40 for each in answers)  # each comes to its end
    assert all(text.split()[0] in ("a", "an", "the", "any", "something", "someone") for text in texts)
    assert len(set(texts)) > 1


def test_its_making_is_drawn_by_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "ROWS", 2)
    monkeypatch.setattr(tiny, "DATA", DataConfig(name="wordnet-definitions", train_size=1000, test_size=50))
    losses = {tiny.make(tmp_path / name, steps=2) for name in ("one", "other")}
    assert len(losses) == 1
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other
    assert 5 < losses.pop() < 8.5  # as good as drawn: ln 2048 is 7.6


@pytest.mark.parametrize("name", ["llama-tiny"])
def test_its_readme_says_how_it_is_made(name):
    text = (KNOWN[name].shipped() / "README.md").read_text()
    assert f"python -m {tiny.__name__} --out" in text
