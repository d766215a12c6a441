from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data import batches
from fedlora.data.tokens import Examples, Padding
from fedlora.errors import DataError

PAD = 99


def make(lengths, pairs=False) -> Examples:
    """Example i is the token i+1, repeated; its label is i."""
    ids = [np.full(length, i + 1, dtype=np.int32) for i, length in enumerate(lengths)]
    types = [np.arange(length, dtype=np.int32) % 2 for length in lengths] if pairs else None
    return Examples(ids, types, np.arange(len(ids)), np.array(lengths, dtype=np.int64))


def train(examples, batch_size, steps, seed=0, side="right"):
    generator = torch.Generator().manual_seed(seed)
    rows = batches.training_rows(examples, batch_size, steps, generator)
    return [batches.pad(examples, each, Padding(PAD, side)) for each in rows]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_reaches_to_the_longest_on_the_side_asked_for(side):
    batch = batches.pad(make([2, 4], pairs=True), np.array([1, 0]), Padding(PAD, side))
    short, mask = ([1, 1, PAD, PAD], [1, 1, 0, 0]) if side == "right" else ([PAD, PAD, 1, 1], [0, 0, 1, 1])
    assert batch.input_ids.tolist() == [[2, 2, 2, 2], short]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], mask]
    assert batch.token_type_ids.tolist() == [[0, 1, 0, 1], [0, 1, 0, 0] if side == "right" else [0, 0, 0, 1]]
    assert batch.labels.tolist() == [1, 0]
    assert {tensor.dtype for tensor in batch.model_inputs().values()} == {torch.int64}


def test_model_inputs_leave_out_what_there_is_not():
    batch = batches.pad(make([2, 4]), np.array([0]), Padding(PAD))
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask"}
    assert len(batch.to("meta")) == 1
    assert batch.to("meta").model_inputs()["input_ids"].device.type == "meta"


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=60)


@given(lengths, st.integers(1, 9), st.integers(1, 3))
def test_every_pass_has_every_example_once(sizes, batch_size, passes):
    per_pass = -(-len(sizes) // batch_size)
    found = train(make(sizes), batch_size, passes * per_pass)
    assert len(found) == passes * per_pass
    for start in range(0, len(found), per_pass):
        seen = Counter(label for batch in found[start : start + per_pass] for label in batch.labels.tolist())
        assert seen == Counter(range(len(sizes)))


@given(lengths, st.integers(1, 70), st.integers(1, 25))
def test_exactly_as_many_steps_as_asked_for(sizes, batch_size, steps):
    found = train(make(sizes), batch_size, steps)
    assert len(found) == steps
    assert max(len(batch) for batch in found) <= min(batch_size, len(sizes))


@given(lengths, st.integers(1, 9))
def test_evaluation_has_every_example_once_and_pads_no_further_than_needed(sizes, batch_size):
    found = list(batches.evaluation_batches(make(sizes), batch_size, Padding(PAD)))
    assert sorted(label for batch in found for label in batch.labels.tolist()) == list(range(len(sizes)))
    for batch in found:
        assert batch.input_ids.shape[1] == max(sizes[label] for label in batch.labels.tolist())
        assert batch.attention_mask.sum(1).tolist() == [sizes[label] for label in batch.labels.tolist()]
        assert torch.equal(batch.input_ids == PAD, batch.attention_mask == 0)


def test_the_order_follows_the_generator_and_changes_from_pass_to_pass():
    examples = make([5] * 40)
    first, again, other = ([batch.labels.tolist() for batch in train(examples, 8, 10, seed)] for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first[:5] != first[5:]


def test_length_windows_save_most_of_the_padding():
    sizes = np.random.default_rng(0).integers(1, 60, 512).tolist()
    found = train(make(sizes), 16, 32)
    padded = sum(batch.input_ids.numel() for batch in found)
    at_random = sum(max(sizes[i : i + 16]) * 16 for i in range(0, 512, 16))
    assert padded - sum(sizes) < 0.3 * (at_random - sum(sizes))


@pytest.mark.parametrize(
    ("count", "batch_size", "steps", "epochs", "expected"),
    [
        (5, 16, 20, None, 20),
        (33, 16, None, 1, 3),
        (33, 16, None, 2, 6),
        (33, 16, None, 0.5, 2),
        (5, 16, None, 0.01, 1),
        (160, 16, None, 0.3, 3),
    ],
)
def test_steps_of_a_round(count, batch_size, steps, epochs, expected):
    assert batches.steps_for(count, batch_size, steps, epochs) == expected


def test_nothing_to_train_on_is_said():
    with pytest.raises(DataError, match="no examples to train on"):
        train(make([]), 4, 1)
    assert list(batches.evaluation_batches(make([]), 4, Padding(PAD))) == []
