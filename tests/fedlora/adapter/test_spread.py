"""How far products are from their mean, measured about one of them, against dense float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import Factors, spread
from fedlora.adapter.spread import Spread


def drawn(shape, ranks, drift, seed):
    """Factors that differ from common ones by `drift`; the common ones are cut or go on to each rank."""
    g = torch.Generator().manual_seed(seed)
    most = max(ranks)
    B, A = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((shape[0], most), (most, shape[1])))
    return [
        Factors(
            B[:, :rank] + drift * torch.randn(shape[0], rank, generator=g, dtype=torch.float64),
            A[:rank] + drift * torch.randn(rank, shape[1], generator=g, dtype=torch.float64),
        )
        for rank in ranks
    ]


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(3, 20), st.integers(3, 20)),
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=9),
    drift=st.sampled_from([1.0, 1e-4, 1e-7]),
    many=st.booleans(),
    batch=st.sampled_from([1, 100, 2**19]),
    seed=st.integers(0, 1000),
)
def test_of_any_pairs(shape, ranks, drift, many, batch, seed):
    """One at a time or several, of one rank or mixed, nearly equal or not."""
    ranks = ranks if drift == 1 else [ranks[0]] * len(ranks)
    pairs = drawn(shape, ranks, drift, seed)
    w = torch.rand(len(ranks), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w[-1] = 0.0 if len(ranks) > 1 else 1.0
    w /= w.sum()
    heaviest = pairs[int(w.argmax())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spread, "_BATCH", batch)
        found = Spread(heaviest, many)
    for weight, pair in zip(w.tolist(), pairs, strict=True):
        found.add(weight, pair)
    ideal = sum(x * pair.product() for x, pair in zip(w, pairs, strict=True))
    wanted = sum(float(x) * float((pair.product() - ideal).square().sum()) for x, pair in zip(w, pairs, strict=True))
    error2 = float((heaviest.product() - ideal).square().sum())
    assert found.of(error2) == pytest.approx(wanted, rel=1e-6, abs=1e-20)


def test_no_more_pairs_wait_than_fill_a_batch(monkeypatch):
    monkeypatch.setattr(spread, "_BATCH", 4 * 12 * 2)
    pairs = drawn((12, 9), [2] * 11, 0.5, seed=1)
    found, waiting = Spread(pairs[0], many=True), []
    for pair in pairs:
        found.add(0.1, pair)
        waiting.append(len(found._waiting))
    assert waiting == [1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
