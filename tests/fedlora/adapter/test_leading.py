"""Leading directions by iteration, against full decompositions in numpy: right where they are certified, and otherwise
not used."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora.adapter import Adapter, Factors, factors, leading
from fedlora.adapter.divergence import measure_module
from fedlora.adapter.factors import ProductSum
from fedlora.adapter.leading import Operator, distances, subspace
from fedlora.adapter.updates import Update, Updates
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.step import advance, measure_round

SIZES = {"stacked": ((520, 440), 100), "dense": ((400, 450), 120)}
"""Shape of a layer and clients of rank 4: the joint rank is below the smaller side, or above."""


def around(shape, rank, clients, drift, seed=0):
    """Clients' factors around common ones, and unequal weights."""
    g = torch.Generator().manual_seed(seed)
    d_out, d_in = shape
    B, A = torch.randn(d_out, rank, generator=g), torch.randn(rank, d_in, generator=g)
    pairs = [
        Factors(
            B + drift * torch.randn(d_out, rank, generator=g),
            A + drift * torch.randn(rank, d_in, generator=g),
        ).to_double()
        for _ in range(clients)
    ]
    raw = 0.2 + torch.rand(clients, generator=g, dtype=torch.float64)
    return pairs, raw / raw.sum()


def with_values(values, shape, seed=0):
    """A matrix with these singular values."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(d, len(values), generator=g, dtype=torch.float64)).Q for d in shape)
    return (left * values) @ right.T


@pytest.mark.parametrize("drift", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize(("shape", "clients"), SIZES.values(), ids=SIZES.keys())
def test_the_tail_to_ten_digits(shape, clients, drift):
    pairs, w = around(shape, 4, clients, drift)
    total = ProductSum.of(pairs, w)
    matrix = total.matrix().numpy()
    found = total.leading(4)
    values = np.linalg.svd(matrix, compute_uv=False)
    tail = (values[4:] ** 2).sum()
    assert type(found).__name__ == "Triples"  # the full decomposition was not needed
    np.testing.assert_allclose(found.S, values[:4], rtol=1e-12)
    left_out = np.linalg.norm(matrix - ((found.U * found.S) @ found.Vh).numpy()) ** 2
    assert left_out == pytest.approx(tail, rel=1e-10)
    for columns in (found.U, found.Vh.T):
        np.testing.assert_allclose(columns.T @ columns, np.eye(4), atol=1e-12)
    measured = distances(total.operator(), pairs[:2], [1, 4])
    assert measured.ideal2 == pytest.approx((values**2).sum(), rel=1e-12)
    assert measured.tails2 == pytest.approx({1: (values[1:] ** 2).sum(), 4: tail}, rel=1e-9)
    errors = [np.linalg.norm(pair.product().numpy() - matrix) ** 2 for pair in pairs[:2]]
    assert measured.errors2 == pytest.approx(errors, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(60, 90), st.integers(60, 90)),
    rank=st.integers(1, 4),
    clients=st.integers(2, 60),
    drift=st.sampled_from([0.01, 0.3, 1.0, 30.0]),
    dense=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_what_is_certified_is_right(shape, rank, clients, drift, dense, seed):
    pairs, w = around(shape, rank, clients, drift, seed)
    total = ProductSum.of(pairs, w)
    matrix = total.matrix()
    operator = Operator(matrix) if dense or total.dense is not None else total.operator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leading, "LARGE", 20)
        patch.setattr(leading, "_MORE", 2)
        found = distances(operator, pairs[:1], {rank})
    values = torch.linalg.svdvals(matrix).square()
    if found is not None:
        assert found.tails2[rank] == pytest.approx(float(values[rank:].sum()), rel=2e-9)
        assert found.ideal2 == pytest.approx(float(values.sum()), rel=1e-10)
        error2 = float((pairs[0].product() - matrix).square().sum())
        assert found.errors2[0] == pytest.approx(error2, rel=2e-9)


@pytest.mark.parametrize("clients", [30, 400], ids=["stacked", "dense"])
def test_what_does_not_settle_is_decomposed(clients):
    """Values so close to each other that no iteration tells them apart within a third of the side."""
    matrix = with_values(torch.linspace(1, 0.999, 400, dtype=torch.float64), (400, 420))
    total = ProductSum.of([Factors(matrix, torch.eye(420, dtype=torch.float64))], [1.0])
    assert subspace(total.operator(), 4) is None
    found, exact = total.leading(4), total.truncated(4)
    assert all(torch.equal(getattr(found, name), getattr(exact, name)) for name in ("U", "S", "Vh"))


def test_residuals_say_what_is_missing():
    """A basis turned out of the leading directions by a known angle falls short by what the values say."""
    values = torch.cat([torch.tensor([8.0, 6.0]), torch.full((30,), 0.5)]).double()
    matrix = with_values(values, (60, 50))
    U, _, _ = torch.linalg.svd(matrix, full_matrices=False)
    angle = 1e-4
    turned = torch.cat([np.cos(angle) * U[:, :1] + np.sin(angle) * U[:, 20:21], U[:, 1:2]], dim=1)
    found = leading.Subspace.of(turned, turned.T @ matrix)
    short = float(values[:2].square().sum() - found.S.square().sum())
    beyond = 64 - 36  # what lies beyond is taken to be as large as the last value that is held
    assert found.falls_short(Operator(matrix), 1) == pytest.approx(short * (64 - 0.25) / beyond, rel=1e-3)
    assert leading.Subspace.of(U[:, :3], U[:, :3].T @ matrix).falls_short(Operator(matrix), 2) < 1e-25


@pytest.mark.parametrize("exact_rank", [2, 4])
@pytest.mark.parametrize(("shape", "clients"), SIZES.values(), ids=SIZES.keys())
def test_a_sum_without_a_tail(shape, clients, exact_rank):
    """One A for all: W* has no more directions than that, and its floor is rounding."""
    pairs, w = around(shape, exact_rank, clients, 0.5)
    shared = [Factors(pair.B, pairs[0].A).at_rank(4) for pair in pairs]
    best = ProductSum.of(shared, w).leading(4)
    assert best.learned().tolist() == [index < exact_rank for index in range(4)]
    found = measure_module(shared, w, [best.balanced()] * clients, common=True)
    assert found.rho < 1e-12
    assert found.floor < 1e-12


def test_factors_that_cancel_each_other_are_left_to_the_exact_way():
    """Twenty pairs a million times as large come in twice, with either sign: of the rest's inner products no digit is
    left, and the residuals do not show it."""
    pairs, w = around((620, 640), 4, 100, 0.3)
    large = [Factors(1e6 * pair.B, pair.A) for pair in around((620, 640), 4, 20, 1.0, seed=7)[0]]
    total = ProductSum.of([*pairs, *large, *large], [*w.tolist(), *[1.0] * 20, *[-1.0] * 20])
    assert total.dense is None
    assert subspace(total.operator(), 4) is not None
    assert distances(total.operator(), [pairs[0]], [4]) is None
    assert distances(ProductSum.of(pairs, w).operator(), [pairs[0]], [4]) is not None


@pytest.mark.parametrize(("shape", "clients"), SIZES.values(), ids=SIZES.keys())
def test_a_broadcast_within_a_hundred_thousandth(shape, clients):
    """ρ = 1e-5 to within 1e-8: no difference of squares."""
    pairs, w = around(shape, 4, clients, 0.5)
    shared = [Factors(pair.B, pairs[0].A) for pair in pairs]
    exact = sum(float(x) * pair.B for x, pair in zip(w, shared, strict=True))
    hat = Factors(exact * (1 + 1e-5), pairs[0].A)
    assert measure_module(shared, w, [hat] * clients, common=True).rho == pytest.approx(1e-5, abs=1e-8)


@pytest.mark.parametrize(("shape", "clients"), SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("apart", [1.0, 1e-4, 1e-7])
def test_dispersion(shape, clients, apart):
    pairs, w = around(shape, 4, clients, apart)
    found = measure_module(pairs, w, [pairs[0]] * clients, common=True)
    ideal = ProductSum.of(pairs, w).matrix()
    spread = sum(float(x) * float((pair.product() - ideal).square().sum()) for x, pair in zip(w, pairs, strict=True))
    assert found.dispersion == pytest.approx(spread, rel=1e-5)


@pytest.mark.parametrize("name", ["svd", "flexlora", "raflora"])
@pytest.mark.parametrize(("shape", "clients"), SIZES.values(), ids=SIZES.keys())
def test_strategies_reach_the_floor(shape, clients, name):
    pairs, _ = around(shape, 4, clients, 0.3)
    updates = Updates.collect(
        Update(u, 1 + u % 3, Adapter({"m": pair.to(torch.float32)})) for u, pair in enumerate(pairs)
    )
    before = ServerState(Adapter({"m": Factors(torch.zeros(shape[0], 4), pairs[0].A.float())}), scaling=2.0)
    strategy = registry.make(name)
    after = advance(strategy, before, updates)
    found = measure_round(strategy, after, updates)
    assert found.rho == pytest.approx(found.floor, rel=1e-6)
    again = advance(strategy, before, updates)
    assert all(torch.equal(again.adapter.tensors()[name], t) for name, t in after.adapter.tensors().items())


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operation made."""

    numbers = 0

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        made = operation(*given, **(named or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_no_matrix_of_the_layer_s_size_and_none_of_the_joint_rank_s_square():
    """While the joint rank is below the side, nothing is larger than the stack of factors."""
    pairs, w = around((1500, 1400), 4, 100, 0.3)
    total = ProductSum.of(pairs, w)
    with Largest() as largest:
        total.leading(4)
        assert distances(total.operator(), pairs[:1], [4]) is not None
    assert largest.numbers == 400 * 1500


def test_a_sum_that_is_nothing_is_no_matter_for_iteration():
    """Further blocks would repeat the columns of the first."""
    left = [torch.zeros(600, 8, dtype=torch.float64)] * 60
    right = [torch.randn(600, 8, dtype=torch.float64)] * 60
    assert leading.subspace(leading.Operator(None, left, right), 8) is None
    pair = Factors(torch.randn(600, 8, dtype=torch.float64), torch.randn(8, 600, dtype=torch.float64))
    assert leading.distances(leading.Operator(None, left, right), [pair], {8}) is None


@pytest.mark.parametrize(("shape", "clients"), SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_fewest_that_hold_a_share(shape, clients, share):
    pairs, w = around(shape, 4, clients, 0.2)
    total = ProductSum.of(pairs, w)
    matrix = total.matrix().numpy()
    U, values, Vh = np.linalg.svd(matrix)
    wanted = int(np.argmax(np.cumsum(values**2) >= share * (values**2).sum())) + 1
    for least in (0, 4):
        found, count = total.holding(share, 4, least), max(wanted, least)
        assert type(found).__name__ == "Triples"  # the full decomposition was not needed
        np.testing.assert_allclose(found.S, values[:count], rtol=1e-12)
        best = U[:, :count] * values[:count] @ Vh[:count]
        np.testing.assert_allclose((found.U * found.S) @ found.Vh, best, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    decay=st.floats(0.5, 0.999),
    share=st.floats(0.05, 0.9999),
    rank=st.integers(1, 6),
    dense=st.booleans(),
    blocks=st.sampled_from([2, 8]),
    seed=st.integers(0, 1000),
)
def test_a_share_however_many_directions_it_takes(decay, share, rank, dense, blocks, seed):
    """Found with what is tried first, with more, or by a full decomposition."""
    wide = with_values(decay ** torch.arange(60, dtype=torch.float64), (80, 70), seed)
    rows = torch.eye(70, dtype=torch.float64)
    pairs = [Factors(wide[:, k : k + 10], rows[k : k + 10]) for k in range(0, 70, 10)]
    total = ProductSum.of(pairs if dense else pairs[:6], [1.0] * (7 if dense else 6))
    assert (total.dense is not None) == dense
    values = torch.linalg.svdvals(total.matrix()).square()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LARGE", 20), ("_MORE", 1), ("_BLOCKS", blocks)):
            patch.setattr(leading, name, value)
        found = total.holding(share, rank)
    count, all2 = len(found.S), float(values.sum())
    assert float(found.S.square().sum()) >= share * all2 * (1 - 1e-9)
    assert float(values[: count - 1].sum()) < share * all2 * (1 + 1e-9)
    torch.testing.assert_close(found.S.square(), values[:count], rtol=0, atol=1e-8 * all2)


def test_a_share_that_takes_too_many_is_given_up_before_the_rest_is_taken_to_all_digits(monkeypatch):
    pairs, w = around((800, 800), 4, 120, 1.0)
    total = ProductSum.of(pairs, w)
    monkeypatch.setattr(leading.Subspace, "beside", lambda *_: pytest.fail("it was"))
    assert subspace(total.operator(), 4) is not None
    assert leading.holding(total.operator(), 0.9999, 4) is None
    found, exact = total.holding(0.9999, 4), total.truncated(800)
    assert torch.equal(found.S, exact.S[: len(found.S)])
    assert float(found.S.square().sum()) >= 0.9999 * float(exact.S.square().sum())


def test_a_share_that_takes_more_than_are_tried_is_found_in_a_second_attempt():
    total = ProductSum.of(
        [Factors(with_values(0.8 ** torch.arange(800).double(), (800, 810)), torch.eye(810).double())], [1.0]
    )
    found = total.holding(0.999, 4)
    assert type(found).__name__ == "Triples"
    assert len(found.S) == 16  # 0.8^(2·16) = 8e-4, and 0.8^(2·15) = 1.2e-3
    np.testing.assert_allclose(found.S, 0.8 ** np.arange(16), rtol=1e-10)


@pytest.mark.parametrize("kept", [2, 4])
@pytest.mark.parametrize("drift", [1.0, 1e-3])
@pytest.mark.parametrize(("shape", "clients"), SIZES.values(), ids=SIZES.keys())
def test_what_leading_directions_leave(shape, clients, drift, kept, monkeypatch):
    """Both together are the sum to rounding, however near the directions are to the leading ones."""
    pairs, w = around(shape, 4, clients, drift)
    total = ProductSum.of(pairs, w)
    matrix, values = total.matrix(), torch.linalg.svdvals(total.matrix())
    with monkeypatch.context() as patch:
        patch.setattr(ProductSum, "truncated", lambda *_: pytest.fail("a full decomposition was taken"))
        patch.setattr(leading, "_DIGITS", 1e-3)
        patch.setattr(leading, "_NOTHING", 1e-3)
        found, rest = total.divided(4, kept, scale=3.0)
    first = found.first(kept)
    assert torch.dist(first.U * first.S @ first.Vh + rest.product() / 3, matrix) < 1e-12 * values[0]
    assert rest.rank == (min(shape) if total.dense is not None else 4 * clients - kept)
    assert float(rest.product().norm() / 3) == pytest.approx(float(values[kept:].norm()), rel=1e-2)
    for columns in (found.U[:, :kept], found.Vh.T):
        np.testing.assert_allclose(columns.T @ columns, np.eye(columns.shape[1]), atol=1e-12)


@pytest.mark.parametrize("exact_rank", [1, 2, 4])
@pytest.mark.parametrize(("shape", "clients"), SIZES.values(), ids=SIZES.keys())
def test_what_leading_directions_leave_of_a_sum_that_has_no_more(shape, clients, exact_rank):
    """Others cancel each other: where fewer directions than are kept carry anything, the rest may lie anywhere."""
    pairs, w = around(shape, exact_rank, clients // 2, 0.5)
    others, v = around(shape, 4, clients // 4, 1.0, seed=5)
    shared = [Factors(pair.B, pairs[0].A).at_rank(4) for pair in pairs]
    total = ProductSum.of([*shared, *others, *others], torch.cat([w, v, -v]))
    found, rest = total.divided(4, 4)
    left_out = total.matrix() - (found.U * found.S) @ found.Vh
    assert torch.dist(rest.product(), left_out) < 1e-12 * found.S[0]
    assert float(left_out.norm()) < 1e-9 * found.S[0]


def test_what_is_not_left_to_rounding_is_decomposed(monkeypatch):
    """Were something of the rest in the coordinates that are dropped, the exact way is taken."""
    pairs, w = around((520, 440), 4, 100, 0.3)
    total = ProductSum.of(pairs, w)
    monkeypatch.setattr(factors, "product_norm", lambda _: 1.0)
    found, rest = total.divided(4, 3, scale=2.0)
    exact = total.truncated(440)
    assert torch.equal(found.S, exact.S[:4])
    assert torch.equal(rest.B, exact.U[:, 3:] * (2.0 * exact.S[3:]))
    assert torch.equal(rest.A, exact.Vh[3:])
