"""Which models' passes clients cannot share: each is found out, with a reason, and the others are let through."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from madeup import made
from torch import nn
from transformers import BertConfig, BertModel

from fedlora.config import ModelConfig
from fedlora.config.lora import LoraConfig
from fedlora.data.tokens import Padding
from fedlora.model.resident import ResidentModel
from fedlora.objective import classification, generation
from fedlora.seeds import Turn
from fedlora.training import sharing
from fedlora.training.cohort import Member

CPU = torch.device("cpu")
RIGHT = Padding(0)


def build(folder, objective=classification.OBJECTIVE, labels=("a", "b", "c"), how=None, **lora) -> ResidentModel:
    config = ModelConfig(name=str(folder), **(how or {}))
    return ResidentModel.build(objective, config, LoraConfig(rank=4, **lora), list(labels), 0, 0, CPU)


def some(model, count=3) -> list[Member]:
    start = sharing.awake(model.read(), 1)
    return [Member(start, made(4 + 3 * place, place), Turn(0, 1, place)) for place in range(count)]


KNOWN = {
    "HiRA multiplies": {"variant": "hira"},
    "DoraEmbeddingLayer": {"variant": "dora", "target_modules": ["word_embeddings"]},
    "model.dtype=fp16": {"how": {"dtype": "fp16"}},
    "gradient_checkpointing computes layers again": {"how": {"gradient_checkpointing": True}},
}


@pytest.mark.parametrize("words", KNOWN)
def test_what_is_known_beforehand_has_its_reason(small_bert, words):
    assert words in sharing.why_alone(build(small_bert(), **KNOWN[words]))


def test_checkpoints_without_dropout_are_shared(small_bert):
    model = build(small_bert(0.0), how={"gradient_checkpointing": True})
    assert sharing.why_alone(model) == ""
    assert sharing.tried(model, some(model), RIGHT) == ""


def test_an_adapted_output_layer_is_known(small_llama):
    model = build(small_llama(), generation.OBJECTIVE, (), target_modules=["lm_head", "q_proj"])
    assert "the output layer is adapted" in sharing.why_alone(model)
    assert sharing.why_alone(build(small_llama(), generation.OBJECTIVE, ())) == ""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_can_be_shared_passes_the_trial(folders, dropout, dtype):
    model = build(folders["roberta"], dropout=dropout, how={"dtype": dtype})
    assert sharing.why_alone(model) == sharing.tried(model, some(model), RIGHT) == ""


class Mixing(nn.Module):
    """Takes from each row the mean of all."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class Random(nn.Module):
    def forward(self, x):
        return x * torch.rand_like(x)


class Odd(nn.Module):
    """Drops from a tensor that has no rows."""

    def forward(self, x):
        return x * nn.functional.dropout(torch.ones(x.shape[-1]), 0.5, self.training)


ODD = {
    Mixing: "is not what each takes alone",
    Random: "draws random numbers by other means than dropout",
    Odd: "dropout is applied to a tensor of 16 numbers",
    lambda: nn.BatchNorm1d(16): "is a BatchNorm1d, in which the rows of a batch see each other",
}


@pytest.mark.parametrize("layer", ODD)
def test_what_nobody_knows_of_is_found_out(small_bert, layer):
    model = build(small_bert(), how={"pooling": "mean"})
    dense = model.peft.get_base_model().encoder.encoder.layer[1].output
    dense.dropout = nn.Sequential(Rows(layer()))
    assert ODD[layer] in (sharing.why_alone(model) or sharing.tried(model, some(model), RIGHT))


class Rows(nn.Module):
    """A layer for rows × width, given rows × tokens × width."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).reshape(x.shape)


def test_a_head_of_an_unknown_kind_is_named(small_bert):
    model = build(small_bert(), how={"pooling": "mean"})
    head = model.peft.get_base_model().classifier.modules_to_save["default"]
    head.__class__ = type("Bilinear", (nn.Linear,), {})
    assert (
        sharing.why_alone(model)
        == "'classifier.modules_to_save.default' is a Bilinear, which is not known for several clients"
    )


def test_the_trial_leaves_the_examples_alone_and_sees_unlike_ones(small_bert):
    model = build(small_bert(), how={"pooling": "mean"})
    members = some(model)
    wrong = replace(members[0].examples, labels=np.roll(members[0].examples.labels, 1))
    assert sharing.tried(model, [replace(members[0], examples=wrong), *members[1:]], RIGHT) == ""


def test_of_quantised_bases_those_are_shared_whose_rows_are_alone(tmp_path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(5)
    shape = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64}
    network = BertModel(BertConfig(**shape, num_attention_heads=2, max_position_embeddings=40))
    network.save_pretrained(tmp_path)
    four, eight = (build(tmp_path, how={"pooling": "mean", "quantization": bits}) for bits in ("nf4", "int8"))
    assert sharing.why_alone(four) == sharing.tried(four, some(four), RIGHT) == ""
    assert "rounds a row by what other rows of its batch hold" in sharing.why_alone(eight)
