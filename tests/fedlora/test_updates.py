"""Uploads in client order, with weights that sum to one."""

import numpy as np
import pytest
import torch

from fedlora.errors import AdapterError
from fedlora.updates import Update, Updates


def of(uploads, *examples, weighting="examples"):
    return Updates.collect((Update(9 - i, n, uploads.adapter(i)) for i, n in enumerate(examples)), weighting)


def test_in_client_order_with_shares_of_the_examples(uploads):
    updates = of(uploads, 1, 3, 4)
    assert updates.clients == (7, 8, 9)
    assert updates.weights.tolist() == [0.5, 0.375, 0.125]
    assert updates.weights.dtype == torch.float64
    assert len(updates) == 3
    assert torch.equal(updates.factors("narrow")[2].A, uploads.adapter(0).factors["narrow"].A)
    assert updates.modules == tuple(sorted(uploads.modules))


def test_uniform_weights_ignore_the_examples(uploads):
    assert of(uploads, 1, 0, 4, 15, weighting="uniform").weights.tolist() == [0.25] * 4


def test_weights_of_awkward_counts_sum_to_one(uploads):
    assert float(of(uploads, *range(1, 8)).weights.sum()) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("examples", [(0, 0), (3, -1)])
def test_weights_that_cannot_be(uploads, examples):
    with pytest.raises(AdapterError, match=r"non-negative with a positive sum, got \["):
        of(uploads, *examples)


def test_nobody(uploads):
    with pytest.raises(AdapterError, match="at least one client"):
        Updates.collect([])


def test_a_client_twice(uploads):
    with pytest.raises(AdapterError, match=r"one update per client.*\(4, 4\)"):
        Updates.collect([Update(4, 1, uploads.adapter(0)), Update(4, 2, uploads.adapter(1))])


def test_means(dense, uploads):
    updates = of(uploads, 1, 3, 4)
    w = updates.weights.numpy()
    for module in uploads.modules:
        pairs = dense.pairs(updates.factors(module))
        found = updates.mean_factors(module)
        np.testing.assert_allclose(found.product(), dense.product_of_means(pairs, w), atol=1e-12)
        torch.testing.assert_close(updates.mean_b(module), found.B, rtol=0, atol=0)
    head = updates.mean_head()
    assert {tensor.dtype for tensor in head.values()} == {torch.float64}
    for name, found in head.items():
        wanted = sum(x * a.head[name].double() for x, a in zip(w, updates.adapters, strict=True))
        torch.testing.assert_close(found, wanted)
