"""Local training of a small random BERT on made-up tokens, against steps taken by hand."""

import numpy as np
import pytest
import torch
from madeup import made

from fedlora.adapter.weights import EVERY_PART, Adapter, parse_name
from fedlora.config import ModelConfig, TrainingConfig
from fedlora.config.lora import LoraConfig
from fedlora.data.tokens import Examples, Padding
from fedlora.errors import RunAborted
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import OBJECTIVE
from fedlora.training import client
from fedlora.training.client import Turn

TURN = Turn(seed=3, round=2, client=5)
B_ONLY = frozenset({"B", "head"})
PLAIN = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.5, "warmup_steps": 0, "max_grad_norm": None}


def resident(folder, **lora) -> ResidentModel:
    config = ModelConfig(name=str(folder), pooling="mean")
    options = LoraConfig(**{"rank": 2, "alpha": 6, **lora})
    return ResidentModel.build(OBJECTIVE, config, options, ["a", "b", "c"], 0, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(small_bert) -> ResidentModel:
    return resident(small_bert(), dropout=0.2)


@pytest.fixture(scope="module")
def still(small_bert) -> ResidentModel:
    """A model without any dropout."""
    return resident(small_bert(0.0))


@pytest.fixture(scope="module")
def start(model) -> Adapter:
    """An adapter whose every tensor has a gradient (B is not zero)."""
    g = torch.Generator().manual_seed(1)
    return Adapter.from_tensors({n: 0.3 * torch.randn(t.shape, generator=g) for n, t in model.read().tensors().items()})


def train(model, start, examples=None, turn=TURN, parts=EVERY_PART, **training) -> client.Trained:
    config = TrainingConfig(**{"local_steps": 3, "batch_size": 8, **training})
    return client.train(model, start, made(20) if examples is None else examples, config, turn, parts, Padding(0))


def same_bits(one: Adapter, other: Adapter) -> bool:
    a, b = one.tensors(), other.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def gradients(model: ResidentModel, at: Adapter, examples: Examples) -> dict[str, torch.Tensor]:
    """The gradient of the mean cross-entropy over all examples, one example at a time and so without padding."""
    model.load(at)
    model.peft.train()
    model.trainable(EVERY_PART)
    model.peft.zero_grad(set_to_none=True)
    for ids, label in zip(examples.input_ids, examples.labels, strict=True):
        row = torch.from_numpy(ids.astype(np.int64))[None]
        logits = model.peft(input_ids=row, attention_mask=torch.ones_like(row)).logits
        (torch.nn.functional.cross_entropy(logits, torch.tensor([label])) / len(examples)).backward()
    return {name: parameter.grad.clone() for name, parameter in model._handles.items()}


def by_hand(model, start, examples, rates, momentum=0.0, decay=0.0, norm=None) -> Adapter:
    """Gradient descent with these learning rates, in plain tensor arithmetic."""
    weights = dict(start.tensors())
    velocity: dict[str, torch.Tensor] = {}
    for rate in rates:
        slopes = gradients(model, Adapter.from_tensors(weights), examples)
        total = torch.sqrt(sum((g**2).sum() for g in slopes.values()))
        shrink = min(1.0, norm / float(total)) if norm else 1.0
        for name, weight in weights.items():
            slope = shrink * slopes[name] + decay * weight
            velocity[name] = momentum * velocity[name] + slope if name in velocity else slope
            weights[name] = weight - rate * velocity[name]
    return Adapter.from_tensors(weights)


def test_the_loss_falls(still, start):
    losses = train(still, start, local_steps=60, learning_rate=1e-2).losses
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"weight_decay": 0.3},
        {"max_grad_norm": 0.05},
        {"momentum": 0.5, "weight_decay": 0.1, "max_grad_norm": 0.1},
    ],
)
def test_sgd_with_warm_up_is_what_it_says(still, start, options):
    """Six steps with a learning rate that rises over four; every batch is the whole of the data."""
    examples = made(6)
    trained = train(still, start, examples, **{**PLAIN, "local_steps": 6, "warmup_steps": 4, **options})
    rates = [0.5 * share for share in (0.25, 0.5, 0.75, 1, 1, 1)]
    expected = by_hand(
        still,
        start,
        examples,
        rates,
        options.get("momentum", 0),
        options.get("weight_decay", 0),
        options.get("max_grad_norm"),
    )
    for name, tensor in trained.adapter.tensors().items():
        moved = expected.tensors()[name] - start.tensors()[name]
        assert moved.abs().max() > 0
        difference = (tensor - expected.tensors()[name]).norm() / moved.norm()
        assert difference < 1e-3, name


def test_clipping_bounds_the_step(still, start):
    trained = train(still, start, **{**PLAIN, "max_grad_norm": 0.01})
    moved = [t - start.tensors()[name] for name, t in trained.adapter.tensors().items()]
    assert float(torch.sqrt(sum((m**2).sum() for m in moved))) == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_adamw_starts_with_a_step_of_the_learning_rate_and_decays_apart_from_it(still, start):
    examples = made(6)
    slopes = gradients(still, start, examples)
    options = {"local_steps": 1, "learning_rate": 0.02, "warmup_steps": 4, "weight_decay": 2.0}
    trained = train(still, start, examples, **options)
    for name, tensor in trained.adapter.tensors().items():
        before, slope = start.tensors()[name], slopes[name]
        clear = slope.abs() > 1e-5  # Adam's first step is lr·sign, save where the gradient is as small as its epsilon
        expected = before * (1 - 0.005 * 2.0) - 0.005 * slope.sign()
        assert clear.any()
        torch.testing.assert_close(tensor[clear], expected[clear], atol=2e-5, rtol=0)


@pytest.mark.parametrize("parts", [B_ONLY, frozenset({"A"}), frozenset({"A", "B"})])
def test_only_the_planned_parts_change(model, start, parts):
    model.trainable(EVERY_PART)
    trained = train(model, start, parts=parts, weight_decay=0.1).adapter.tensors()
    for name, tensor in start.tensors().items():
        assert torch.equal(trained[name], tensor) == (parse_name(name).part not in parts), name


def test_one_turn_gives_the_same_bits_whatever_the_model_held_before(model, start):
    first = train(model, start)
    other = Adapter.from_tensors({name: tensor + 1 for name, tensor in start.tensors().items()})
    train(model, other, made(9, seed=4), Turn(9, 9, 9), frozenset({"A"}), learning_rate=0.1)
    model.peft.eval()
    torch.manual_seed(12345)
    again = train(model, start)
    assert same_bits(first.adapter, again.adapter)
    assert first.losses == again.losses


@pytest.mark.parametrize("turn", [Turn(3, 2, 6), Turn(3, 3, 5), Turn(4, 2, 5)])
def test_another_turn_gives_others(model, start, turn):
    assert not same_bits(train(model, start).adapter, train(model, start, turn=turn).adapter)


def test_batches_and_dropout_each_follow_from_the_turn(model, still, start):
    """Without dropout only the batches differ; with one batch of everything only the dropout does."""
    elsewhere = Turn(3, 2, 6)
    assert not same_bits(train(still, start).adapter, train(still, start, turn=elsewhere).adapter)
    everything = {"examples": made(6), "batch_size": 8}
    one, other = (train(model, start, turn=turn, **everything).losses for turn in (TURN, elsewhere))
    assert one[0] != other[0]
    one, other = (train(still, start, turn=turn, **everything).losses for turn in (TURN, elsewhere))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_neither_the_start_nor_the_base_is_touched(model, start):
    before = {name: tensor.clone() for name, tensor in start.tensors().items()}
    base = {n: p.detach().clone() for n, p in model.peft.named_parameters() if "lora" not in n and "default" not in n}
    train(model, start)
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.tensors().items())
    assert all(torch.equal(p, base[n]) for n, p in model.peft.named_parameters() if n in base)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"local_steps": 7}, 7),
        ({"local_steps": None, "local_epochs": 2}, 6),
        ({"local_steps": None, "local_epochs": 0.5}, 2),
        ({"local_steps": None, "local_epochs": 0.01}, 1),
    ],
)
def test_steps_or_epochs_say_how_many_losses_there_are(model, start, options, steps):
    """20 examples in batches of 8 are three batches a pass."""
    trained = train(model, start, **options)
    assert len(trained.losses) == steps
    assert trained.seconds > 0
    assert all(type(loss) is float for loss in trained.losses)


def test_the_optimiser_forgets_between_rounds(still, start):
    """Two rounds of one momentum step are two plain steps, not two steps with momentum."""
    examples, options = made(6), {**PLAIN, "momentum": 0.9}
    middle = train(still, start, examples, **options).adapter
    end = train(still, middle, examples, **options).adapter
    expected = by_hand(still, start, examples, [0.5, 0.5])
    for name, tensor in end.tensors().items():
        torch.testing.assert_close(tensor, expected.tensors()[name], atol=1e-4, rtol=1e-4)


def test_divergence_names_client_round_and_step(model, start):
    with pytest.raises(RunAborted, match=r"client 5, round 2: the loss is (nan|inf) at step [23], .*learning_rate"):
        train(model, start, **{**PLAIN, "local_steps": 4, "learning_rate": 1e30})


def test_a_last_step_that_diverges_is_noticed_too(model, start):
    """The loss is taken before the step: with one step it is finite, and what came out is not."""
    huge = {**PLAIN, "learning_rate": 3e38, "weight_decay": 100.0}
    with pytest.raises(RunAborted, match=r"client 5, round 2: tensor .* not finite .*lower training.learning_rate"):
        train(model, Adapter.from_tensors({n: 1e3 * t for n, t in start.tensors().items()}), **huge)


OPTIMISERS = {
    "adamw with decay": {"optimizer": "adamw", "learning_rate": 1e-2, "weight_decay": 0.3, "max_grad_norm": None},
    "sgd with momentum and clipping": {
        **{"optimizer": "sgd", "learning_rate": 0.3, "momentum": 0.9, "weight_decay": 0.1, "max_grad_norm": 0.2}
    },
}


@pytest.fixture(scope="module")
def low_and_high(small_bert):
    """`low_and_high("dora")`: models without dropout at rank 2 and, scaled alike, at rank 5; a start of rank 2."""
    folder = small_bert(0.0)

    def make(variant):
        targets = ["query", "intermediate.dense", "word_embeddings"]  # 16 × 16, 24 × 16 and 16 × 99
        models = [
            resident(folder, alpha=7, variant=variant, target_modules=targets, ranks=ranks) for ranks in (None, [2, 5])
        ]
        g = torch.Generator().manual_seed(1)
        drawn = {
            name: tensor * 1.2 if parse_name(name).part == "magnitude" else 0.3 * torch.randn(tensor.shape, generator=g)
            for name, tensor in models[0].read().tensors().items()
        }
        return *models, Adapter.from_tensors(drawn)

    return make


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "hira"])
def test_a_lower_rank_trains_as_in_a_model_of_that_rank(low_and_high, variant, optimiser):
    low, high, start = low_and_high(variant)
    options = {**OPTIMISERS[optimiser], "local_steps": 6}
    alone = train(low, start, **options)
    within = train(high, start, **options)
    assert within.adapter.rank == 2
    np.testing.assert_allclose(within.losses, alone.losses, rtol=1e-4)
    expected, before = alone.adapter.tensors(), start.tensors()
    for name, tensor in within.adapter.tensors().items():
        moved = (expected[name] - before[name]).norm()
        assert moved > 0
        assert (tensor - expected[name]).norm() < 2e-3 * moved, name
    for pair in high.read().factors.values():  # nothing has leaked behind the client's rank
        assert pair.rank == 5
        assert not pair.B[:, 2:].any()
        assert not pair.A[2:].any()


def test_ranks_may_differ_by_module(low_and_high):
    _, high, start = low_and_high("lora")
    first, *others = start.modules
    mixed = start.with_factors({**start.factors, first: start.factors[first].at_rank(1)})
    trained = train(high, mixed).adapter
    assert {module: pair.rank for module, pair in trained.factors.items()} == {first: 1} | dict.fromkeys(others, 2)


def test_magnitudes_train_with_what_is_planned(low_and_high):
    low, _, start = low_and_high("dora")
    with_them = train(low, start, parts=frozenset({"B", "magnitude"})).adapter
    without = train(low, start, parts=frozenset({"A", "B"})).adapter
    for module, vector in start.magnitudes.items():
        assert not torch.equal(with_them.magnitudes[module], vector)
        assert torch.equal(without.magnitudes[module], vector)


def test_a_penalty_is_trained_but_not_reported(still, start):
    """A penalty of ½‖B‖² pulls B down; the losses are those of the data alone."""

    def squares(factors, begun):
        assert same_bits(begun, start)
        return sum(pair.B.square().sum() for pair in factors.values()) / 2

    plain = train(still, start, **PLAIN)
    pulled = client.train(
        still,
        start,
        made(20),
        TrainingConfig(**{**PLAIN, "batch_size": 8}),
        TURN,
        EVERY_PART,
        Padding(0),
        penalty=squares,
    )
    assert pulled.losses == plain.losses
    for module, pair in pulled.adapter.factors.items():
        expected = plain.adapter.factors[module].B - 0.5 * start.factors[module].B
        torch.testing.assert_close(pair.B, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pair.A, plain.adapter.factors[module].A)
