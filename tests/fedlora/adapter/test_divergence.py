"""ρ, its floor, and R, P, Q against dense numpy."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import Adapter, Factors, leading
from fedlora.adapter.base_update import BaseUpdate
from fedlora.adapter.divergence import Divergence, effective_clients, measure, measure_module
from fedlora.adapter.updates import Updates


@pytest.fixture(autouse=True, scope="module", params=[leading.LARGE, 6], ids=["small", "as if large"])
def _route(request):
    """Everything here also where leading directions are tried before a full decomposition."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leading, "LARGE", request.param)
        yield


def make(uploads, shape, ranks, seed=0, dtype=torch.float64):
    generator = uploads.generator(seed)
    return [uploads.factors(shape, rank, generator, dtype) for rank in ranks]


def weights(count, seed=0):
    w = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.05
    return w / w.sum()


def padded(array, shape):
    """Filled up with zeros."""
    return np.pad(array, [(0, to - size) for size, to in zip(array.shape, shape, strict=True)])


def moved(own, hat):
    """‖B̂ − B‖² and ‖Â − A‖² with the shorter padded with zeros."""
    rank = max(own[1].shape[0], hat[1].shape[0])
    sides = [((len(own[0]), rank), own[0], hat[0]), ((rank, own[1].shape[1]), own[1], hat[1])]
    return [np.linalg.norm(padded(after, shape) - padded(before, shape)) ** 2 for shape, before, after in sides]


def check(dense, found, factors, w, broadcasts, base=0.0):
    """All of a module's numbers against their definitions in ALGORITHMS §2–3."""
    w, pairs, hats = w.numpy(), dense.pairs(factors), dense.pairs(broadcasts)
    ideal = dense.mean_product(pairs, w)
    full = [B @ A + base for B, A in hats]
    each = list(zip(w, pairs, hats, full, strict=True))
    about = {"rel": 1e-9, "abs": 1e-9}
    assert found.rho == pytest.approx(dense.rho(full, ideal, w), **about)
    floors = [dense.floor(ideal, A.shape[0]) ** 2 for _, A in hats]
    assert found.floor == pytest.approx(np.sqrt(w @ floors), rel=1e-9, abs=1e-7)
    assert found.excess == found.rho - found.floor
    assert pytest.approx(sum(x * np.linalg.norm(hat - B @ A) ** 2 for x, (B, A), _, hat in each), **about) == found.R
    assert pytest.approx(sum(x * moved(own, hat)[0] for x, own, hat, _ in each), **about) == found.P
    assert pytest.approx(sum(x * moved(own, hat)[1] for x, own, hat, _ in each), **about) == found.Q
    spread = sum(x * np.linalg.norm(B @ A - ideal) ** 2 for x, (B, A), _, _ in each)
    assert found.dispersion == pytest.approx(spread, **about)
    assert found.ideal2 == pytest.approx(np.linalg.norm(ideal) ** 2, **about)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(2, 24), st.integers(2, 24)),
    ranks=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=7),
    common=st.booleans(),
    merged=st.integers(0, 30),
    seed=st.integers(0, 10_000),
)
def test_against_dense(dense, uploads, shape, ranks, common, merged, seed):
    """Any shape, number of clients, weights and ranks of uploads and broadcasts; one broadcast for all, or one each;
    with or without a base update, narrow and full."""
    up, down = [list(part) for part in zip(*ranks, strict=True)]
    factors, w = make(uploads, shape, up, seed), weights(len(ranks), seed)
    broadcasts = make(uploads, shape, down, seed + 1)
    broadcasts = broadcasts[:1] * len(ranks) if common else broadcasts
    (base,) = make(uploads, shape, [merged], seed + 2) if merged else [None]
    found = measure_module(factors, w, broadcasts, range(len(ranks)), base=base, common=common)
    check(dense, found, factors, w, broadcasts, base.product().numpy() if merged else 0.0)
    if not merged:
        assert found.floor <= found.rho + 1e-9
    if common:
        assert pytest.approx(found.error2 + found.dispersion, rel=1e-9) == found.R


def test_two_hundred_clients(dense, uploads):
    factors, w = make(uploads, (13, 8), [2] * 200), weights(200)
    broadcasts = make(uploads, (13, 8), [2], 1) * 200
    check(dense, measure_module(factors, w, broadcasts, common=True), factors, w, broadcasts)


SIZES = [((90, 60), 6), ((9, 14), 6), ((90, 60), 1)]


class TestATinyDivergence:
    """A true ρ of 1e-5 to within 1e-6, where differences of squares are off by 7e-4 (ALGORITHMS §3)."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize(("shape", "count"), SIZES)
    def test_of_a_common_broadcast(self, uploads, shape, count, dtype):
        """With one A for all, W* = B̄A, and (1 + 1e-5)·B̄ is off by 1e-5 of it."""
        drawn, w = make(uploads, shape, [3] * count, dtype=dtype), weights(count)
        factors = [Factors(f.B, drawn[0].A) for f in drawn]
        exact = sum(x * f.B.double() for x, f in zip(w, factors, strict=True))
        broadcast = Factors((exact * (1 + 1e-5)).to(dtype), factors[0].A)
        assert measure_module(factors, w, [broadcast] * count).rho == pytest.approx(1e-5, abs=1e-6)
        assert measure_module(factors, w, [Factors(exact, factors[0].A.double())] * count).rho < 1e-12

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize(("shape", "count"), SIZES)
    def test_of_several_ranks(self, uploads, shape, count, dtype):
        """W* of rank one, so that a broadcast of any rank can be as near; also client by client."""
        drawn, w = make(uploads, shape, [1 + u % 3 for u in range(count)], dtype=dtype), weights(count)
        (first,) = make(uploads, shape, [1], 5, dtype)
        factors = [Factors(f.B * (torch.arange(f.rank) == 0), torch.cat([first.A, f.A[1:]])) for f in drawn]
        exact = sum(x * f.B[:, :1].double() for x, f in zip(w, factors, strict=True))
        signs = [1 if u % 2 else -1 for u in range(count)]
        broadcasts = [
            Factors((exact * (1 + sign * 1e-5)).to(dtype), first.A).at_rank(f.rank)
            for sign, f in zip(signs, factors, strict=True)
        ]
        found = measure_module(factors, w, broadcasts, range(count))
        assert found.rho == pytest.approx(1e-5, abs=1e-6)
        assert all(rho == pytest.approx(1e-5, abs=1e-6) for rho in found.by_client.values())
        assert len(found.by_client) == (count if count > 1 else 0)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize(("shape", "count"), SIZES)
    @pytest.mark.parametrize("share", [0.0, 1.0, 300.0])
    def test_of_a_base_update(self, uploads, shape, count, dtype, share):
        """Adapter and base together are (1 + 1e-5)·W*; both may be far larger than what they make together."""
        factors, w = make(uploads, shape, [1 + u % 3 for u in range(count)], dtype=torch.float64), weights(count)
        (hat,) = make(uploads, shape, [3], 5)
        hat = Factors(share * hat.B, hat.A).to(dtype)
        whole = sum(x * f.product() for x, f in zip(w, factors, strict=True)) * (1 + 1e-5)
        eye = torch.eye(shape[1], dtype=torch.float64)
        base = Factors(whole - hat.to_double().product(), eye)
        if share <= 1:
            base = base.to(dtype)
        found = measure_module(factors, w, [hat] * count, base=base)
        assert found.rho == pytest.approx(1e-5, abs=1e-6)

    def test_of_a_whole_round(self, uploads):
        """Through `measure`, where the base update carries the scaling s = 4."""
        updates = uploads.updates(4)
        means = {m: updates.mean_product(m).factors() for m in updates.modules}
        step = BaseUpdate.of({m: Factors(4 * (1 + 1e-5) * pair.B, pair.A) for m, pair in means.items()})
        nothing = Adapter({m: Factors(0 * f.B, f.A) for m, f in updates.adapters[0].factors.items()})
        assert measure(updates, [nothing] * 4, None, step, 4.0).rho == pytest.approx(1e-5, abs=1e-6)
        assert measure(updates, [nothing] * 4, None, step, 1.0).rho == pytest.approx(3, abs=1e-3)


def test_floor_by_hand():
    """W* = diag(4, 3) after weights (1/2, 1/2): rank one leaves 3 of 5."""
    one = Factors(torch.tensor([[8.0], [0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    two = Factors(torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0, 2.0, 0.0]]))
    best = Factors(torch.tensor([[4.0], [0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    found = measure_module([one, two], torch.tensor([0.5, 0.5]), [best, best])
    assert found.floor == pytest.approx(0.6)
    assert found.rho == pytest.approx(0.6)
    assert found.excess == pytest.approx(0, abs=1e-12)
    # R = 1/2·‖diag(4,0) − diag(8,0)‖² + 1/2·‖diag(4,0) − diag(0,6)‖² = 1/2·16 + 1/2·52
    assert pytest.approx(34) == found.R


class TestPersonalBroadcasts:
    def test_are_weighted_by_the_client_and_listed(self, dense, uploads):
        factors, w = make(uploads, (7, 5), [2] * 3), weights(3)
        broadcasts = make(uploads, (7, 5), [2] * 3, 1)
        found = measure_module(factors, w, broadcasts, (4, 9, 11))
        ideal = dense.mean_product(dense.pairs(factors), w.numpy())
        for client, (B, A) in zip((4, 9, 11), dense.pairs(broadcasts), strict=True):
            assert found.by_client[client] == pytest.approx(np.linalg.norm(B @ A - ideal) / np.linalg.norm(ideal))
        rms = sum(x * found.by_client[c] ** 2 for x, c in zip(w.tolist(), (4, 9, 11), strict=True)) ** 0.5
        assert found.rho == pytest.approx(rms)

    def test_that_are_the_uploads_leave_only_dispersion(self, uploads):
        factors = make(uploads, (7, 5), [2] * 3)
        found = measure_module(factors, weights(3), factors)
        assert found.R < 1e-20
        assert found.P == found.Q == 0
        assert found.error2 == pytest.approx(found.dispersion)

    @pytest.mark.parametrize("count", [4, 12])
    @pytest.mark.parametrize("apart", [1.0, 1e-4, 1e-7])
    @pytest.mark.parametrize("ranks", [[3], [3, 2]], ids=["equal ranks", "mixed ranks"])
    def test_dispersion_of_clients_that_are_nearly_equal(self, dense, uploads, count, apart, ranks):
        """Four clients in coordinates, twelve on the dense route; a difference of squares is off by 1 % at 1e-7."""
        common, *own = make(uploads, (40, 23), [3] * (count + 1))
        moved = [Factors(common.B + apart * pair.B, common.A + apart * pair.A) for pair in own]
        factors = [pair.at_rank(ranks[u % len(ranks)]) for u, pair in enumerate(moved)] if apart == 1 else moved
        w, pairs = weights(count), dense.pairs(factors)
        w[1] = 0.0  # one that does not count
        w /= w.sum()
        ideal = dense.mean_product(pairs, w.numpy())
        spread = sum(x * np.linalg.norm(B @ A - ideal) ** 2 for x, (B, A) in zip(w.numpy(), pairs, strict=True))
        found = measure_module(factors, w, [common] * count, common=True)
        assert found.dispersion == pytest.approx(spread, rel=1e-5)
        assert pytest.approx(found.error2 + spread, rel=1e-5) == found.R

    def test_equal_ones_give_what_a_common_one_gives(self, uploads):
        factors, w = make(uploads, (7, 5), [2] * 3), weights(3)
        (pair,) = make(uploads, (7, 5), [2], 1)
        common = measure_module(factors, w, [pair] * 3, (0, 1, 2), common=True)
        apart = measure_module(factors, w, [pair] * 3, (0, 1, 2))
        for name in ("error2", "ideal2", "tail2", "R", "P", "Q", "dispersion"):
            assert getattr(apart, name) == pytest.approx(getattr(common, name), rel=1e-9, abs=1e-9)
        assert common.by_client == {}
        assert set(apart.by_client) == {0, 1, 2}


class TestGrouping:
    """A common broadcast is measured once for each rank; others by client, whatever memory they share."""

    def test_by_rank(self, dense, uploads):
        factors, w = make(uploads, (12, 9), [3, 1, 2, 1, 3]), weights(5)
        (whole,) = make(uploads, (12, 9), [3], 1)
        broadcasts = [whole.at_rank(f.rank) for f in factors]
        found = measure_module(factors, w, broadcasts, range(5), common=True)
        check(dense, found, factors, w, broadcasts)
        assert found.by_client[0] == found.by_client[4]
        assert found.by_client[1] == found.by_client[3]
        assert len(set(found.by_client.values())) == 3

    def test_by_either_factor(self, dense, uploads):
        """One A for all, and a B of their own: personal."""
        factors, w = make(uploads, (12, 9), [2] * 3), weights(3)
        broadcasts = [Factors(f.B, factors[0].A) for f in make(uploads, (12, 9), [2] * 3, 1)]
        found = measure_module(factors, w, broadcasts, (7, 8, 9))
        check(dense, found, factors, w, broadcasts)
        assert set(found.by_client) == {7, 8, 9}

    def test_a_common_one_has_no_values_by_client(self, uploads):
        factors = make(uploads, (12, 9), [2] * 3)
        (hat,) = make(uploads, (12, 9), [2], 1)
        assert measure_module(factors, weights(3), [hat] * 3, (7, 8, 9), common=True).by_client == {}

    def test_p_and_q_by_hand(self):
        """Upload of rank 1, broadcast of rank 2: P = (3−1)² + 2², Q = 0 + 5²."""
        own = Factors(torch.tensor([[1.0]]), torch.tensor([[1.0, 0.0]]))
        hat = Factors(torch.tensor([[3.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]]))
        found = measure_module([own], torch.tensor([1.0]), [hat])
        assert pytest.approx((8, 25)) == (found.P, found.Q)
        back = measure_module([hat], torch.tensor([1.0]), [own])
        assert pytest.approx((8, 25)) == (back.P, back.Q)


class TestZeros:
    def test_nothing_learned_and_nothing_lost(self):
        zero = Factors(torch.zeros(4, 2), torch.ones(2, 3))
        found = measure_module([zero, zero], torch.tensor([0.5, 0.5]), [zero, zero])
        assert found.rho == found.floor == found.excess == 0

    def test_something_made_of_nothing(self):
        zero = Factors(torch.zeros(4, 2), torch.ones(2, 3))
        one = Factors(torch.ones(4, 2), torch.ones(2, 3))
        assert measure_module([zero], torch.tensor([1.0]), [one]).rho == float("inf")

    def test_a_client_without_weight_counts_for_nothing(self, dense, uploads):
        factors = make(uploads, (6, 7), [2, 2])
        found = measure_module(factors, torch.tensor([1.0, 0.0]), [factors[0]] * 2)
        assert [found.rho, found.R, found.P, found.Q] == pytest.approx([0] * 4, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "count"),
    [([0.25] * 4, 4), ([1.0, 0.0, 0.0], 1), ([3.0, -1.0], 1.6), ([-2.0, 2.0], 2), ([0.0, 0.0], 0), ([7.0], 1)],
)
def test_effective_clients(values, count):
    """(3, −1): shares 3/4 and 1/4, 1/(9/16 + 1/16) = 1.6; signs do not cancel."""
    assert effective_clients(torch.tensor(values)) == pytest.approx(count)


class TestModel:
    @pytest.fixture
    def measured(self, uploads):
        updates = uploads.updates(4)
        hat = uploads.adapter(77)
        return updates, hat, measure(updates, [hat] * 4, {"narrow": torch.tensor([1.0, 0, 0, 0])}, common=True)

    def test_squares_add_up_over_modules(self, dense, uploads, measured):
        """ρ_model = sqrt(Σ num²/Σ den²), not the mean of the modules' ρ."""
        updates, hat, found = measured
        w, wrong, ideals, tails = updates.weights.numpy(), 0, 0, 0
        for module in uploads.modules:
            ideal = dense.mean_product(dense.pairs(updates.factors(module)), w)
            (pair,) = dense.pairs([hat.factors[module]])
            wrong += np.linalg.norm(pair[0] @ pair[1] - ideal) ** 2
            ideals += np.linalg.norm(ideal) ** 2
            tails += (np.linalg.svd(ideal, compute_uv=False)[uploads.rank :] ** 2).sum()
        assert found.rho == pytest.approx((wrong / ideals) ** 0.5)
        assert found.floor == pytest.approx((tails / ideals) ** 0.5)
        assert found.excess == found.rho - found.floor
        for name in ("R", "P", "Q", "dispersion"):
            total = sum(getattr(module, name) for module in found.modules.values())
            assert getattr(found, name) == pytest.approx(total)

    def test_mixing_is_by_module(self, measured):
        updates, _, found = measured
        even = 1 / float(updates.weights.square().sum())
        assert found.modules["narrow"].effective_clients == pytest.approx(1)
        assert found.modules["encoder.layer.1.mlp"].effective_clients == pytest.approx(even)
        assert found.effective_clients == pytest.approx((2 * even + 1) / 3)

    def test_json_and_back(self, uploads, measured):
        updates, _, common = measured
        personal = measure(updates, [uploads.adapter(70 + u) for u in range(4)])
        for found in (common, personal):
            content = json.loads(json.dumps(found.to_json()))
            assert content["narrow"]["rho"] == found.modules["narrow"].rho
            assert content["narrow"]["excess"] == found.modules["narrow"].excess
            assert Divergence.from_json(content) == found
        assert sorted(personal.modules["narrow"].by_client) == [0, 1, 2, 3]

    def test_heads_do_not_matter(self, uploads, measured):
        updates, hat, found = measured
        bare = Updates(updates.clients, tuple(Adapter(a.factors) for a in updates.adapters), updates.weights)
        assert measure(bare, [Adapter(hat.factors)] * 4, common=True).rho == found.rho
