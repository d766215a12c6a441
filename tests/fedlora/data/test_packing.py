"""Several examples in one row: what is in it, and that the loss and its gradients are those of each alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from fedlora.adapter.weights import EVERY_PART, Adapter
from fedlora.config import ModelConfig, RunConfig, TrainingConfig
from fedlora.config.lora import LoraConfig
from fedlora.data.batches import pad
from fedlora.data.packing import pack
from fedlora.data.tokens import Examples, Padding
from fedlora.data.turns import IGNORED
from fedlora.errors import DataError, ModelError
from fedlora.model.apart import keeps_apart
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import OBJECTIVE as CLASSIFICATION
from fedlora.objective.generation import OBJECTIVE
from fedlora.training import client
from fedlora.training.client import Turn

PADDING = Padding(0)


def made(lengths, prompts=None) -> Examples:
    """Random tokens; the first of each, as many as its prompt has, are not trained."""
    rng = np.random.default_rng(1)
    ids = [rng.integers(3, 600, length).astype(np.int32) for length in lengths]
    targets = [row.copy() for row in ids]
    for target, prompt in zip(targets, prompts or [0] * len(ids), strict=True):
        target[:prompt] = IGNORED
    return Examples(ids, None, np.zeros(len(ids), np.int64), np.array(lengths, np.int64), targets)


def test_what_is_in_the_rows():
    examples = made([2, 5, 3, 1])
    batch = pack(examples, np.array([3, 0, 1, 2]), PADDING)
    a, b, c, d = (row.tolist() for row in examples.input_ids)
    assert batch.input_ids.tolist() == [b, c + a, d + [0] * 4]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    no = IGNORED
    assert batch.labels.tolist() == [[no, *b[1:]], [no, *c[1:], no, *a[1:]], [no] * 5]
    assert set(batch.model_inputs()) == {"input_ids", "position_ids", "use_cache"}
    assert batch.to("meta").position_ids.device.type == "meta"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_every_token_is_there_once_in_rows_no_longer_than_the_longest(lengths):
    examples = made(lengths)
    batch = pack(examples, np.arange(len(lengths)), PADDING)
    assert batch.input_ids.shape[1] == max(lengths)
    assert int((batch.labels != IGNORED).sum()) == sum(lengths) - len(lengths)
    assert len(batch) <= 2 * -(-sum(lengths) // max(lengths))
    starts = (batch.position_ids == 0).sum()
    assert len(lengths) <= starts <= len(lengths) + len(batch)


def test_labels_are_no_dialogues():
    with pytest.raises(DataError, match=r"training\.packing is for dialogues"):
        pack(Examples([np.ones(3, np.int32)], None, np.zeros(1, np.int64), np.array([3])), np.array([0]), PADDING)


@pytest.fixture(scope="module")
def llama(small_llama) -> ResidentModel:
    config = ModelConfig(name=str(small_llama()))
    return ResidentModel.build(OBJECTIVE, config, LoraConfig(rank=2, alpha=6), ["all"], 0, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def start(llama) -> Adapter:
    g = torch.Generator().manual_seed(1)
    return Adapter.from_tensors({n: 0.3 * torch.randn(t.shape, generator=g) for n, t in llama.read().tensors().items()})


def gradients(model, batch):
    model.peft.zero_grad(set_to_none=True)
    loss = OBJECTIVE.loss(model, batch)
    loss.mean.backward()
    assert loss.units == OBJECTIVE.units(batch)
    return loss.mean.item(), {name: each.grad.clone() for name, each in model._handles.items()}


def test_loss_and_gradients_are_those_of_unpacked_examples(llama, start):
    examples = made([20, 7, 13, 5, 9, 2, 18, 11], [4, 3, 1, 0, 8, 1, 17, 5])
    llama.load(start)
    llama.trainable(EVERY_PART)
    rows = np.arange(8)
    packed = pack(examples, rows, PADDING)
    assert len(packed) < 6
    (mean, each), (as_packed, packed_each) = (
        gradients(llama, batch) for batch in (pad(examples, rows, PADDING), packed)
    )
    assert as_packed == pytest.approx(mean, rel=1e-5)
    for name, gradient in each.items():
        torch.testing.assert_close(packed_each[name], gradient, rtol=1e-4, atol=1e-6)


def trained(model, start, **options):
    examples = made([20, 7, 13, 5, 9, 2, 18, 11] * 3, [4, 3, 1, 0, 8, 1, 17, 5] * 3)
    settings = {"local_steps": 4, "optimizer": "sgd", "learning_rate": 0.1, "warmup_steps": 0, **options}
    return client.train(model, start, examples, TrainingConfig(**settings), Turn(3, 2, 5), EVERY_PART, PADDING)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 12, "packing": True},
        {"batch_size": 3, "gradient_accumulation": 4},
        {"batch_size": 3, "gradient_accumulation": 4, "packing": True},
        {"batch_size": 5, "gradient_accumulation": 4, "local_epochs": 2, "local_steps": None},
    ],
)
def test_a_client_learns_the_same_packed_and_accumulated(llama, start, options):
    """Of 24 examples: two steps a pass. The last batch of a step may be smaller, and has units of its own."""
    size = options["batch_size"] * options.get("gradient_accumulation", 1)
    whole = trained(llama, start, batch_size=size, **{k: v for k, v in options.items() if k.startswith("local")})
    found = trained(llama, start, **options)
    assert len(found.losses) == len(whole.losses) == 4
    assert found.losses == pytest.approx(whole.losses, rel=1e-4)
    for name, tensor in whole.adapter.tensors().items():
        torch.testing.assert_close(found.adapter.tensors()[name], tensor, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(tensor, start.tensors()[name]) for name, tensor in whole.adapter.tensors().items())


def test_a_penalty_counts_once_a_step(llama, start):
    def pull(live, begun):
        return sum(((pair.B - 1) ** 2).sum() for pair in live.values())

    examples = made([9, 4, 6, 7])
    settings = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.01, "warmup_steps": 0, "max_grad_norm": None}
    one, four = (
        client.train(
            llama, start, examples, TrainingConfig(batch_size=4 // n, gradient_accumulation=n, **settings),
            Turn(0, 1, 0), EVERY_PART, PADDING, pull,
        )
        for n in (1, 4)
    )  # fmt: skip
    for name, tensor in one.adapter.tensors().items():
        torch.testing.assert_close(four.adapter.tensors()[name], tensor, rtol=1e-4, atol=1e-6)


SHAPE = {"vocab_size": 600, "n_layer": 2, "n_head": 4}


@pytest.fixture
def resident(tmp_path):
    def of(network, **options):
        network.save_pretrained(tmp_path / "model")
        config = ModelConfig(name=str(tmp_path / "model"), **options)
        return ResidentModel.build(OBJECTIVE, config, LoraConfig(rank=2), ["all"], 0, 0, torch.device("cpu"))

    return of


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_attention_that_honours_positions_keeps_examples_apart(small_llama, resident, dtype):
    assert keeps_apart(resident(AutoModelForCausalLM.from_pretrained(small_llama()), dtype=dtype))
    assert keeps_apart(resident(GPT2LMHeadModel(GPT2Config(n_embd=32, **SHAPE)), dtype=dtype))


def test_a_model_that_does_not_is_refused(resident):
    model = resident(BloomForCausalLM(BloomConfig(hidden_size=32, **SHAPE)))
    config = RunConfig.model_validate({"task": "generation", "training": {"packing": True}})
    with pytest.raises(ModelError, match=r"training\.packing=true: .* lets examples of one row see each other"):
        OBJECTIVE.check_model(config, model)
    OBJECTIVE.check_model(RunConfig(task="generation"), model)


def test_units_of_labels_are_examples():
    batch = pad(
        Examples([np.ones(3, np.int32)] * 2, None, np.zeros(2, np.int64), np.array([3, 3])), np.arange(2), PADDING
    )
    assert CLASSIFICATION.units(batch) == 2
