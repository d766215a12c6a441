"""Batches of several clients as one: a client's own stays where it is, what is added counts for nothing."""

from dataclasses import replace

import numpy as np
import torch
from madeup import made

from fedlora.data.batches import pad
from fedlora.data.joined import join
from fedlora.data.packing import pack
from fedlora.data.tokens import Padding
from fedlora.data.turns import IGNORED


def test_each_clients_own_batch_is_in_its_rows_as_it_is():
    padding = Padding(7, "left")
    batches = [pad(made(count, count), np.arange(count), padding) for count in (3, 5, 1)]
    joined = join(batches, padding)
    assert joined.rows == 5
    assert joined.tokens == max(batch.input_ids.shape[1] for batch in batches)
    for client, (batch, (rows, tokens)) in enumerate(zip(batches, joined.own, strict=True)):
        own = slice(5 * client, 5 * client + rows)
        assert torch.equal(joined.batch.input_ids[own, :tokens], batch.input_ids)
        assert torch.equal(joined.batch.attention_mask[own, :tokens], batch.attention_mask)
        assert torch.equal(joined.batch.labels[own], batch.labels)
        assert (joined.batch.input_ids[own, tokens:] == 7).all()
        assert not joined.batch.attention_mask[own, tokens:].any()


def test_rows_that_are_repeated_count_for_nothing_and_the_others_add_up_to_their_share():
    batches = [pad(made(count, count), np.arange(count), Padding(0)) for count in (3, 5)]
    shares = join(batches, Padding(0)).shares([6, 5])
    assert torch.equal(shares[0], torch.tensor([1, 1, 1, 0, 0], dtype=torch.float64) / 6)
    assert float(shares[1].sum()) == 1


def test_a_client_without_a_batch_has_rows_that_are_nobodys():
    batch = pad(made(3, 3), np.arange(3), Padding(0))
    joined = join([None, batch], Padding(0))
    assert joined.own == ((0, 0), (3, batch.input_ids.shape[1]))
    assert not joined.shares([4, 3])[0].any()
    assert joined.batch.attention_mask[:3].any(1).all()


def test_nothing_is_trained_of_what_is_added_and_packed_rows_end_in_a_stretch_of_their_own():
    dialogues = [replace(made(count, count), targets=made(count, count).input_ids) for count in (2, 6)]
    joined = join([pack(each, np.arange(len(each)), Padding(0)) for each in dialogues], Padding(0))
    (rows, tokens), _ = joined.own
    assert tokens < joined.tokens
    assert (joined.batch.labels[:rows, tokens:] == IGNORED).all()
    assert (joined.batch.labels[rows : joined.rows] == IGNORED).all()
    assert joined.batch.position_ids[:rows, tokens:].tolist() == [list(range(joined.tokens - tokens))] * rows
