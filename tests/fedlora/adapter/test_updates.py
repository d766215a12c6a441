"""Uploads in client order, with weights that sum to one; read when they are looked at, and let go of again."""

import gc
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.divergence import measure
from fedlora.adapter.updates import ModuleUploads, Update, Updates
from fedlora.errors import AdapterError
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.step import advance


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


@pytest.mark.parametrize("examples", [(0, 0), (3, -1), (1, float("nan")), (1, float("inf"))])
def test_weights_that_cannot_be(uploads, examples):
    with pytest.raises(AdapterError, match=r"non-negative with a positive sum, got \["):
        of(uploads, *examples)


def test_nobody():
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
        torch.testing.assert_close(updates.mean_a(module), found.A, rtol=0, atol=0)
        product = updates.mean_product(module).factors().product()
        np.testing.assert_allclose(product, dense.mean_product(pairs, w), atol=1e-12)
    head = updates.mean_head()
    assert {tensor.dtype for tensor in head.values()} == {torch.float64}
    for name, found in head.items():
        wanted = sum(x * a.head[name].double() for x, a in zip(w, updates.adapters, strict=True))
        torch.testing.assert_close(found, wanted)


def test_means_of_magnitudes():
    """(1·1 + 3·5)/4 = 4."""
    pair = Factors(torch.ones(2, 1), torch.ones(1, 3))
    given = [
        Update(u, n, Adapter({"m": pair}, {}, {"m": torch.full((2,), x)})) for u, n, x in ((0, 1, 1.0), (1, 3, 5.0))
    ]
    assert Updates.collect(given).mean_magnitudes()["m"].tolist() == [4, 4]


class TestSeveralRanks:
    @pytest.fixture
    def updates(self):
        """Ranks 1 and 2, shares 1/4 and 3/4."""
        low = Factors(torch.tensor([[4.0], [8.0]]), torch.tensor([[4.0, 0, 0]]))
        high = Factors(torch.tensor([[0.0, 4.0], [4.0, 0.0]]), torch.tensor([[0, 4.0, 0], [0, 0, 4.0]]))
        return Updates.collect([Update(0, 1, Adapter({"m": low})), Update(1, 3, Adapter({"m": high}))])

    def test_as_uploaded_padded_and_cut(self, updates):
        assert [pair.rank for pair in updates.factors("m")] == [1, 2]
        assert [pair.rank for pair in updates.factors("m", 3)] == [3, 3]
        padded, cut = updates.factors("m", 2)[0], updates.factors("m", 1)[1]
        assert (padded.B.tolist(), padded.A.tolist()) == ([[4, 0], [8, 0]], [[4, 0, 0], [0, 0, 0]])
        assert (cut.B.tolist(), cut.A.tolist()) == ([[0], [4]], [[0, 4, 0]])

    def test_means_are_of_padded_factors(self, updates):
        found = updates.mean_factors("m", 2)
        assert found.B.tolist() == [[1, 3], [5, 0]]
        assert found.A.tolist() == [[1, 3, 0], [0, 0, 3]]
        assert updates.mean_b("m", 2).tolist() == found.B.tolist()
        assert updates.mean_a("m", 2).tolist() == found.A.tolist()

    def test_the_mean_product_needs_no_padding(self, updates):
        """¼·[[16, 0, 0], [32, 0, 0]] + ¾·[[0, 0, 16], [0, 16, 0]]."""
        assert updates.mean_product("m").factors().product().tolist() == [[4, 0, 12], [8, 12, 0]]


class Counted(Mapping[str, Factors]):
    """Factors that are made when they are looked at, and counted while anything of them is alive."""

    alive, most, read = 0, 0, 0

    def __init__(self, seed, modules, rank, shared_a):
        self.seed, self.modules, self.rank, self.shared_a = seed, modules, rank, shared_a

    def __getitem__(self, module):
        generator = torch.Generator().manual_seed(1000 * self.seed + len(module))
        d_out, d_in = self.modules[module]
        A = self.shared_a[module].A if self.shared_a else torch.randn(self.rank, d_in, generator=generator)
        pair = Factors(torch.randn(d_out, self.rank, generator=generator), A.clone())
        for tensor in (pair.B, pair.A):
            Counted.alive += 1
            weakref.finalize(tensor, self.gone)
        Counted.read += 1
        Counted.most = max(Counted.most, Counted.alive)
        return pair

    @staticmethod
    def gone():
        Counted.alive -= 1

    def __iter__(self):
        return iter(self.modules)

    def __len__(self):
        return len(self.modules)


MEANS = ["fedit", "zero-padding", "hetlora", "replication", "ffa-lora", "rolora", "fedsvd", "lora-fair"]
PRODUCTS = ["svd", "flexlora", "flora", "oracle", "fedex-lora", "raflora", "fedrot-lora", "fedmomentum", "florist"]


class TestReadWhenLookedAt:
    """Forty clients, whose factors exist only while somebody holds them."""

    @pytest.fixture
    def situation(self):
        modules = {"wide": (9, 14), "long one": (11, 6)}
        start = {m: Factors(torch.zeros(shape[0], 2), torch.ones(2, shape[1])) for m, shape in modules.items()}

        def make(shared):
            adapters = [Adapter(Counted(u, modules, 2, start if shared else None)) for u in range(40)]
            updates = Updates.collect(Update(u, 1 + u % 3, adapter) for u, adapter in enumerate(adapters))
            gc.collect()
            Counted.most = Counted.alive = Counted.read = 0
            return ServerState(Adapter(start), scaling=4.0), updates

        return make

    @pytest.mark.parametrize("name", MEANS + PRODUCTS)
    def test_never_are_all_clients_in_memory(self, situation, name):
        """Not while aggregating and not while measuring: at most a pair being added and the next."""
        state, updates = situation(shared=name in ("ffa-lora", "fedsvd", "rolora"))
        strategy = registry.make(name)
        new = advance(strategy, state, updates)
        assert Counted.read >= 2 * 40
        assert Counted.most <= 3 * 2
        broadcasts = [strategy.broadcast(new, client) for client in updates.clients]
        assert measure(updates, broadcasts, None, new.base_step, new.scaling).rho >= 0
        assert Counted.most <= 3 * 2
        gc.collect()
        assert Counted.alive == 0

    def test_the_count_sees_what_is_kept(self, situation):
        """So that the test above can fail."""
        _, updates = situation(shared=False)
        kept = list(updates.factors("wide"))
        assert Counted.most == 2 * len(kept) == 80

    def test_slices_are_read_later_too(self, situation):
        _, updates = situation(shared=False)
        some = updates.factors("wide", 3)[10:13]
        assert isinstance(some, ModuleUploads)
        assert (len(some), Counted.read) == (3, 0)
        assert [pair.rank for pair in some] == [3, 3, 3]
        assert Counted.read == 3
        with pytest.raises(IndexError):
            some[3]

    def test_measuring_reads_every_upload_once(self, situation):
        """Beside the first for its shape, and the one about which the dispersion is taken."""
        state, updates = situation(shared=False)
        for adapter in updates.adapters:
            adapter.factors.ranks = dict.fromkeys(updates.modules, 2)  # as factors in files have
        found = measure(updates, [state.adapter] * 40, common=True)
        assert Counted.read == len(updates.modules) * (40 + 2)
        assert found.dispersion > 0
