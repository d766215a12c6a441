"""Clients trained together against the same clients trained one by one, in float64: nothing but rounding may differ."""

import traceback
from dataclasses import replace

import numpy as np
import pytest
import torch
from madeup import made
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.adapter.weights import EVERY_PART, Adapter
from fedlora.config import ModelConfig, TrainingConfig
from fedlora.config.lora import LoraConfig
from fedlora.data.tokens import Padding
from fedlora.data.turns import IGNORED
from fedlora.errors import ClientFailed
from fedlora.model import resident
from fedlora.model.resident import ResidentModel
from fedlora.objective import classification, generation, regression
from fedlora.seeds import Turn
from fedlora.training import client, cohort
from fedlora.training.cohort import Member

ADAMW = {"local_steps": 20, "batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.1}
SIZES = (20, 9, 33, 5)


def build(folder, objective=classification.OBJECTIVE, pooling="mean", how=None, **lora) -> ResidentModel:
    config = ModelConfig(name=str(folder), pooling=pooling, **(how or {}))
    labels = ["a", "b", "c"] if objective is classification.OBJECTIVE else []
    options = LoraConfig(**{"rank": 4, "alpha": 6, **lora})
    return ResidentModel.build(objective, config, options, labels, 0, 0, torch.device("cpu"))


@pytest.fixture
def exact(monkeypatch):
    """`exact(model)`: everything in float64, the loss and what is read among it."""

    def double(model):
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        monkeypatch.setattr(resident, "STORED", torch.float64)
        model.peft.double()
        return model

    return double


def drawn(model, seed=1) -> Adapter:
    """An adapter whose every tensor has a gradient."""
    g = torch.Generator().manual_seed(seed)
    like = model.read().tensors()
    return Adapter.from_tensors(
        {
            name: tensor.double() * 1.2
            if "magnitude" in name
            else 0.3 * torch.randn(tensor.shape, generator=g).double()
            for name, tensor in like.items()
        }
    )


def members(model, examples=made, ranks=(4, 2, 3, 1), starts=None) -> list[Member]:
    """Four clients with other starts, ranks, sizes and lengths."""
    return [
        Member((starts or drawn)(model, seed).cut(rank), examples(size, seed), Turn(3, 2, seed))
        for seed, (size, rank) in enumerate(zip(SIZES, ranks, strict=True))
    ]


RIGHT = Padding(0)


def differences(model, clients, options, parts=EVERY_PART, padding=RIGHT, penalty=None) -> tuple[float, float]:
    """The largest of losses and of tensors, between clients alone and together; what is trained must have moved."""
    training = TrainingConfig(**{**ADAMW, **options})
    alone = [
        client.train(model, each.start, each.examples, training, each.turn, parts, padding, penalty) for each in clients
    ]
    together = cohort.train(model, clients, training, parts, padding, penalty)
    losses, tensors = 0.0, 0.0
    for each, one, other in zip(clients, alone, together, strict=True):
        assert one.adapter.rank == other.adapter.rank == each.start.rank
        assert len(one.losses) == len(other.losses)
        losses = max(losses, float(np.abs(np.subtract(one.losses, other.losses)).max()))
        expected, found, before = (adapter.tensors() for adapter in (one.adapter, other.adapter, each.start))
        assert expected.keys() == found.keys()
        assert any(not torch.equal(found[name], before[name]) for name in found)
        tensors = max(tensors, *(float((expected[name] - found[name]).abs().max()) for name in expected))
    return losses, tensors


EPOCHS = {"local_steps": None, "local_epochs": 2}
OPTIONS = {
    "adamw": {},
    "unequal steps": EPOCHS,
    "plain sgd": {"optimizer": "sgd", "learning_rate": 0.1, **EPOCHS},
    "accumulated": {"batch_size": 3, "gradient_accumulation": 3, **EPOCHS},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.1, "max_grad_norm": 0.05, **EPOCHS},
    "no clipping": {"max_grad_norm": None, "local_steps": 3, "warmup_steps": 0},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_an_encoder_with_every_dropout(small_bert, exact, options):
    model = exact(build(small_bert(), dropout=0.2))
    assert max(differences(model, members(model), OPTIONS[options])) < 1e-9


FEW = {"local_steps": 4, "learning_rate": 2e-2}
MODELS = {
    "its own head, eager": ("roberta", {"pooling": "head", "how": {"attention": "eager"}, "dropout": 0.1}),
    "two layers of a head": ("distilbert", {"pooling": "head"}),
    "rslora": ("bert", {"variant": "rslora", "alpha": 3}),
    "dora": ("bert", {"variant": "dora", "target_modules": ["query", "intermediate.dense"]}),
    "dora, dropout": ("bert", {"variant": "dora", "dropout": 0.3}),
    "dora, transposed": ("gpt2", {"variant": "dora", "pooling": "head"}),
    "embeddings": ("bert", {"target_modules": ["word_embeddings", "value"]}),
    "Conv1D, the last token": ("gpt2", {"pooling": "head", "dropout": 0.1}),
    "grouped heads": ("llama", {"pooling": "head"}),
}


@pytest.mark.parametrize("case", MODELS)
def test_other_models_heads_and_variants(folders, exact, case):
    name, how = MODELS[case]
    model = exact(build(folders[name], **how))
    assert max(differences(model, members(model), FEW)) < 1e-9


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_padding_on_the_left(folders, exact, name):
    model = exact(build(folders[name], pooling="mean" if name == "bert" else "head"))
    assert max(differences(model, members(model), FEW, padding=Padding(0, "left"))) < 1e-9


@pytest.mark.parametrize("parts", [{"A", "head"}, {"B"}, {"A", "B"}])
def test_only_the_planned_parts(small_bert, exact, parts):
    model = exact(build(small_bert()))
    assert max(differences(model, members(model), FEW, frozenset(parts))) < 1e-9


@pytest.mark.parametrize("shape", [(4, 4), (2, 2, 2)])
def test_cores_whole_and_in_blocks(small_bert, exact, shape):
    model = exact(build(small_bert()))
    g = torch.Generator().manual_seed(2)

    def with_cores(model, seed):
        plain = drawn(model, seed)
        return replace(plain, cores={m: torch.randn(shape, generator=g).double() for m in plain.modules})

    clients = members(model, ranks=(4,) * 4, starts=with_cores)
    assert max(differences(model, clients, FEW, frozenset({"core", "head"}))) < 1e-9


def test_a_penalty_of_each_clients_factors(small_bert, exact):
    model = exact(build(small_bert()))

    def pulls(factors, begun):
        return sum((pair.B[:, 0] - begun.factors[m].B[:, 0]).square().sum() for m, pair in factors.items()) * begun.rank

    assert max(differences(model, members(model), FEW, penalty=pulls)) < 1e-9
    training, clients = TrainingConfig(**{**ADAMW, **FEW}), members(model)
    pulled, plain = (cohort.train(model, clients, training, EVERY_PART, RIGHT, each) for each in (pulls, None))
    for one, other in zip(pulled, plain, strict=True):
        assert not torch.equal(*(next(iter(each.adapter.factors.values())).B for each in (one, other)))


def numbers(count, seed):
    examples = made(count, seed)
    return replace(examples, values=np.random.default_rng(seed).normal(size=count).astype(np.float64))


def test_regression(small_bert, exact):
    model = exact(build(small_bert(), regression.OBJECTIVE, dropout=0.1))
    assert max(differences(model, members(model, numbers), FEW)) < 1e-9


def dialogues(count, seed):
    """The first tokens are not trained: as many as the example's label says, and one."""
    examples = made(count, seed)
    targets = [
        np.where(np.arange(len(ids)) > label, ids, IGNORED)
        for ids, label in zip(examples.input_ids, examples.labels, strict=True)
    ]
    return replace(examples, targets=targets)


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """The folder of a small Llama that writes."""
    path = tmp_path_factory.mktemp("writer")
    torch.manual_seed(5)
    shape = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1}
    LlamaForCausalLM(LlamaConfig(**shape, **heads, max_position_embeddings=64)).save_pretrained(path)
    return path


WRITING = {
    "padded": {},
    "packed": {"packing": True},
    "accumulated": {"gradient_accumulation": 3, "batch_size": 2},
}


@pytest.mark.parametrize("options", WRITING)
def test_generation(writer, exact, options):
    model = exact(build(writer, generation.OBJECTIVE, "auto", dropout=0.1))
    assert max(differences(model, members(model, dialogues), {**FEW, **WRITING[options]})) < 1e-9


def test_generation_in_parts_of_the_vocabulary(writer, exact, monkeypatch):
    monkeypatch.setattr("fedlora.model.prediction._NUMBERS", 99 * 7)
    model = exact(build(writer, generation.OBJECTIVE, "auto"))
    assert max(differences(model, members(model, dialogues), FEW)) < 1e-9


def test_gradient_checkpointing_without_dropout(small_bert, exact):
    model = exact(build(small_bert(0.0), how={"gradient_checkpointing": True}))
    assert max(differences(model, members(model), FEW)) < 1e-9


def test_single_precision_differs_by_rounding(small_bert):
    model = build(small_bert(), dropout=0.2)
    clients = [
        replace(each, start=Adapter.from_tensors({n: t.float() for n, t in each.start.tensors().items()}))
        for each in members(model)
    ]
    losses, tensors = differences(model, clients, {"local_steps": 8})
    assert 0 < losses < 1e-5
    assert tensors < 1e-3


def test_a_client_that_diverges_fails_alone(small_bert, exact):
    model = exact(build(small_bert()))
    clients = members(model)
    training = TrainingConfig(**{**ADAMW, **FEW})
    alone = cohort.train(model, clients[1:], training, EVERY_PART, RIGHT)
    broken = Adapter.from_tensors({name: each * float("inf") for name, each in clients[0].start.tensors().items()})
    first, *others = cohort.train(model, [replace(clients[0], start=broken), *clients[1:]], training, EVERY_PART, RIGHT)
    assert isinstance(first, ClientFailed)
    assert "client 0, round 2: the loss is nan at step 1" in str(first)
    for one, other in zip(alone, others, strict=True):
        np.testing.assert_allclose(one.losses, other.losses, atol=1e-12)
        for name, tensor in one.adapter.tensors().items():
            torch.testing.assert_close(other.adapter.tensors()[name], tensor, atol=1e-12, rtol=0)


class NobodyWaits(TorchDispatchMode):
    """Within, nothing asks a device for a number, which waits for all that it was given to do.

    What stays: Transformers asks of a mask whether it is all ones; torch counts an optimiser's steps on the CPU.
    """

    ASKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")
    STAYS = ("transformers/masking_utils.py", "torch/optim/", "fedlora/data/batches.py")

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func is torch.ops.aten.index.Tensor else ()
        by_mask = any(each is not None and each.dtype == torch.bool for each in indices)
        if func.overloadpacket.__name__ in self.ASKS or by_mask:
            stack = traceback.extract_stack()
            if not any(each in frame.filename for frame in stack for each in self.STAYS):
                self.asked.append(f"{func}: {stack[-2].filename}:{stack[-2].lineno}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", ["classification", "generation"])
@pytest.mark.parametrize("together", [False, True])
def test_no_step_waits_for_a_device(small_bert, writer, monkeypatch, what, together):
    if what == "classification":
        model, examples = build(small_bert(), dropout=0.1), made
    else:
        model, examples = build(writer, generation.OBJECTIVE, "auto"), dialogues
    clients = members(model, examples)
    training = TrainingConfig(local_steps=3, batch_size=4, gradient_accumulation=2)
    model.objective.get_ready(model)
    watch = NobodyWaits()
    if together:
        monkeypatch.setattr(cohort._Cohort, "_step", _within(watch, cohort._Cohort._step))
        cohort.train(model, clients, training, EVERY_PART, RIGHT)
    else:
        monkeypatch.setattr(client, "_backward", _within(watch, client._backward))
        client.train(model, clients[0].start, clients[0].examples, training, clients[0].turn, EVERY_PART, RIGHT)
    assert watch.asked == []
    with watch:
        torch.ones(1).item()
    assert watch.asked, "a watch that sees nothing"


def _within(watch, function):
    def inner(*args, **kwargs):
        with watch:
            return function(*args, **kwargs)

    return inner
