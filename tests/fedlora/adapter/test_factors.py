"""Sums of products in factor space against dense numpy, on every route (stacked, dense, at the border of the two)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora.adapter import Factors
from fedlora.adapter.factors import (
    Frame,
    ProductSum,
    beside_identity,
    fresh_factors,
    keep_trainable,
    mean,
    mean_factors,
    product_norm,
)

ROUTES = {
    "stacked": ((40, 23), [3, 3]),
    "dense past the narrow side": ((40, 23), [3] * 8),
    "dense past the low side": ((17, 53), [3] * 8),
    "dense past both": ((9, 14), [3] * 8),
    "one column below": ((13, 15), [3] * 4),
    "exactly as wide": ((12, 15), [3] * 4),
    "different ranks": ((19, 31), [1, 4, 2]),
    "one client": ((8, 5), [3]),
    "one client as wide": ((3, 5), [3]),
}


def make(uploads, shape, ranks, seed=0, dtype=torch.float64):
    generator = uploads.generator(seed)
    return [uploads.factors(shape, rank, generator, dtype) for rank in ranks]


class Products(TorchDispatchMode):
    """The ranks of the products of matrices that are added to another."""

    def __init__(self):
        super().__init__()
        self.of_ranks = []

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        if "mm" in str(operation):
            self.of_ranks.append(given[-1].shape[0])
        return operation(*given, **(named or {}))


@pytest.fixture(params=ROUTES.values(), ids=ROUTES.keys())
def case(request, uploads):
    """(factors, coefficients of mixed sign)."""
    shape, ranks = request.param
    return make(uploads, shape, ranks), torch.linspace(-0.7, 1.3, len(ranks), dtype=torch.float64)


class TestProductSum:
    def test_is_the_sum(self, dense, case):
        factors, c = case
        wanted, total = dense.mean_product(dense.pairs(factors), c.numpy()), ProductSum.of(factors, c)
        pair = total.factors()
        np.testing.assert_allclose(pair.product(), wanted, atol=1e-11)
        assert pair.rank <= min(wanted.shape)
        assert pair.B.dtype == torch.float64
        matrix = torch.randn(wanted.shape[1], 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        np.testing.assert_allclose(total.times(matrix), wanted @ matrix.numpy(), atol=1e-11)

    @pytest.mark.parametrize("shape", [(7, 9), (9, 7), (8, 8)])
    def test_a_matrix_beside_an_identity_is_added_as_it_is(self, uploads, shape):
        """Without a product of the layer's size, to the bits that one has."""
        (thin,) = make(uploads, shape, [2])
        matrices = [torch.randn(shape, generator=uploads.generator(seed), dtype=torch.float64) for seed in (1, 2)]
        whole = [beside_identity(matrix) for matrix in matrices]
        before = [matrix.clone() for matrix in matrices]
        with Products() as products:
            found = ProductSum.of([*whole, thin], [1.0] * 3).matrix()
        assert products.of_ranks == [thin.rank]
        wanted = torch.zeros(shape, dtype=torch.float64)
        for pair in (*whole, thin):
            wanted.addmm_(pair.B, pair.A)
        assert torch.equal(found, wanted)
        assert all(torch.equal(matrix, kept) for matrix, kept in zip(matrices, before, strict=True))
        almost = Factors(whole[0].B.clone(), whole[0].A.clone())
        (almost.B if shape[0] <= shape[1] else almost.A)[0, 1] = 0.5
        torch.testing.assert_close(ProductSum.of([almost], [1.0]).matrix(), almost.product())

    def test_does_not_grow_with_the_pairs(self, dense, uploads):
        """Memory is bounded by the dense matrix and a stack of a few hundred columns, however many are added."""
        factors, total, widest = make(uploads, (12, 9), [2] * 400), ProductSum((12, 9)), 0
        for pair in factors:
            widest = max(widest, total.add(1.0, pair).width)
        assert widest < 300
        assert total.dense.shape == (12, 9)
        np.testing.assert_allclose(total.dense, dense.mean_product(dense.pairs(factors), [1.0] * 400), atol=1e-10)

    def test_adding_goes_on_after_looking(self, dense, case):
        """`truncated` and `factors` leave the sum as it is."""
        factors, c = case
        total = ProductSum.of(factors, c)
        total.truncated(2), total.factors()
        total.add(-2.0, factors[0])
        wanted = dense.mean_product(dense.pairs([*factors, factors[0]]), [*c.tolist(), -2.0])
        np.testing.assert_allclose(total.factors().product(), wanted, atol=1e-11)

    def test_does_not_change_what_it_is_given(self, uploads):
        (pair,) = make(uploads, (4, 3), [3])
        before = pair.B.clone(), pair.A.clone()
        ProductSum.of([pair, pair], [0.5, -2.0]).add(3.0, pair)
        assert torch.equal(pair.B, before[0])
        assert torch.equal(pair.A, before[1])

    def test_of_fp32_is_summed_in_float64(self, dense, uploads):
        factors = make(uploads, (8, 9), [2, 2], dtype=torch.float32)
        wanted = dense.mean_product(dense.pairs(factors), [0.25, 0.75])
        np.testing.assert_allclose(
            ProductSum.of(factors, [0.25, 0.75]).factors().product(), wanted, rtol=1e-12, atol=1e-13
        )

    def test_of_nothing(self):
        with pytest.raises(ValueError, match="at least one pair"):
            ProductSum.of([], [])

    def test_one_coefficient_each(self, uploads):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            ProductSum.of(make(uploads, (4, 5), [1, 1]), [1.0])


class TestFrame:
    @pytest.fixture
    def framed(self, case, uploads):
        factors, c = case
        others = make(uploads, factors[0].shape, [2, 1], seed=7)
        return Frame(ProductSum.of(factors, c), others), factors, c, others

    def test_keeps_norms_inner_products_and_singular_values(self, dense, framed):
        frame, factors, c, others = framed
        wanted = dense.mean_product(dense.pairs(factors), c.numpy())
        k = min(frame.total.shape)
        np.testing.assert_allclose(
            torch.linalg.svdvals(frame.total), np.linalg.svd(wanted, compute_uv=False)[:k], atol=1e-11
        )
        for index, (B, A) in enumerate(dense.pairs(others)):
            found = frame.other(index)
            np.testing.assert_allclose(found.norm(), np.linalg.norm(B @ A), rtol=1e-12)
            np.testing.assert_allclose((found - frame.total).norm(), np.linalg.norm(B @ A - wanted), rtol=1e-12)
            assert float((found * frame.total).sum()) == pytest.approx(float((B @ A * wanted).sum()), rel=1e-9)

    def test_lift_gives_the_matrix_back(self, dense, framed):
        frame, factors, c, others = framed
        for inside, wanted in (
            (frame.total, dense.mean_product(dense.pairs(factors), c.numpy())),
            (frame.other(1), others[1].product().numpy()),
        ):
            left, right = frame.lift(inside, torch.eye(inside.shape[1], dtype=torch.float64))
            np.testing.assert_allclose(left @ right.T, wanted, atol=1e-11)

    def test_lift_of_dependent_columns(self, dense, uploads):
        """Where the triangle cannot be inverted, the basis itself is used: clients that coincide, and B of zeros."""
        one, zero = make(uploads, (30, 20), [2, 3])
        zero = Factors(torch.zeros_like(zero.B), zero.A)
        total = ProductSum.of([one, one, zero], [0.5, 0.25, 0.25])
        cut = total.truncated(4)
        np.testing.assert_allclose((cut.U * cut.S) @ cut.Vh, 0.75 * one.product(), atol=1e-12)
        np.testing.assert_allclose(cut.U.T @ cut.U, np.eye(4), atol=1e-12)
        np.testing.assert_allclose(cut.Vh @ cut.Vh.T, np.eye(4), atol=1e-12)

    def test_is_no_larger_than_the_joint_rank(self, uploads):
        """Nothing of d_out × d_in is formed while Σr is below both."""
        factors = make(uploads, (400, 300), [2, 3, 4])
        assert Frame(ProductSum.of(factors[:2], [1.0, 1.0]), factors[2:]).total.shape == (9, 9)


class TestTruncatedSVD:
    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_is_the_best_approximation(self, dense, case, rank):
        factors, c = case
        ideal = dense.mean_product(dense.pairs(factors), c.numpy())
        cut = ProductSum.of(factors, c).truncated(rank)
        assert (cut.U.shape, cut.S.shape, cut.Vh.shape) == ((len(ideal), rank), (rank,), (rank, ideal.shape[1]))
        np.testing.assert_allclose((cut.U * cut.S) @ cut.Vh, dense.truncated(ideal, rank), atol=1e-10)
        left_out = np.linalg.svd(ideal, compute_uv=False)[rank:]
        np.testing.assert_allclose(cut.tail, left_out[: len(cut.tail)], atol=1e-10)
        np.testing.assert_allclose(cut.U.T @ cut.U, np.eye(rank), atol=1e-12)
        np.testing.assert_allclose(cut.Vh @ cut.Vh.T, np.eye(rank), atol=1e-12)
        for pair in (cut.balanced(), cut.on_b()):
            np.testing.assert_allclose(pair.product(), dense.truncated(ideal, rank), atol=1e-10)

    def test_of_a_joint_rank_below_what_is_asked(self, uploads):
        """As many directions as there are; whoever stores them fills up the rest."""
        (pair,) = make(uploads, (30, 20), [2])
        cut = ProductSum.of([pair], [1.0]).truncated(5)
        assert cut.S.shape == (2,)
        assert not cut.tail.numel()

    def test_the_leading_directions_of_the_leading_directions(self, dense, uploads):
        factors = make(uploads, (30, 20), [3, 3])
        few, many = (
            ProductSum.of(factors, [1.0, 1.0]).truncated(2),
            ProductSum.of(factors, [1.0, 1.0]).truncated(5).first(2),
        )
        for name in ("U", "S", "Vh", "tail"):
            torch.testing.assert_close(getattr(many, name), getattr(few, name))

    def test_balanced_by_hand(self):
        """B = (0, 3)ᵀ, A = (0, 0, 12): one singular value, 36, so that each side has norm 6."""
        factors = Factors(torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0, 0.0, 12.0]]))
        split, uneven = (getattr(ProductSum.of([factors], [1.0]).truncated(1), kind)() for kind in ("balanced", "on_b"))
        assert split.B.abs().flatten().tolist() == pytest.approx([0, 6])
        assert split.A.abs().flatten().tolist() == pytest.approx([0, 0, 6])
        assert uneven.B.abs().flatten().tolist() == pytest.approx([0, 36])
        assert uneven.A.abs().flatten().tolist() == pytest.approx([0, 0, 1])
        for pair in (split, uneven):
            torch.testing.assert_close(pair.product().float(), factors.product())

    @pytest.mark.parametrize("kind", ["balanced", "on_b"])
    def test_directions_without_learning_stay_trainable(self, uploads, kind):
        """B of rank one in three columns: two directions are idle, and rounding must not make them look learned."""
        (pair,) = make(uploads, (11, 7), [3])
        flat = Factors(pair.B[:, :1] @ torch.ones(1, 3, dtype=torch.float64), pair.A)
        split = getattr(ProductSum.of([flat, flat], [0.5, 0.5]).truncated(3), kind)()
        assert (split.B != 0).any(dim=0).tolist() == [True, False, False]
        torch.testing.assert_close(split.A[1:] @ split.A[1:].T, torch.eye(2, dtype=torch.float64))
        torch.testing.assert_close(split.product(), flat.product())

    @pytest.mark.parametrize("shape", [(5, 4), (30, 20)])
    def test_of_nothing(self, shape):
        zero = Factors(torch.zeros(shape[0], 2), torch.ones(2, shape[1]) + torch.eye(2, shape[1]))
        split = ProductSum.of([zero, zero], [0.5, 0.5]).truncated(2).balanced()
        assert not split.B.any()
        torch.testing.assert_close(split.A @ split.A.T, torch.eye(2, dtype=torch.float64))


class TestMeans:
    def test_by_hand(self):
        """3/4·(4, 8) + 1/4·(0, 4) = (3, 7)."""
        found = mean([torch.tensor([4.0, 8.0]), torch.tensor([0.0, 4.0])], torch.tensor([0.75, 0.25]))
        assert found.tolist() == [3, 7]
        assert found.dtype == torch.float64

    def test_does_not_touch_what_it_is_given(self):
        given_ = torch.ones(3, dtype=torch.float64)
        mean([given_, given_], torch.tensor([0.5, 0.5]))
        assert given_.tolist() == [1, 1, 1]

    def test_accumulates_in_float64(self):
        """In fp32 a million and one thousandth is a million."""
        found = mean([torch.tensor([1e6]), torch.tensor([2e-3])], torch.tensor([1.0, 0.5], dtype=torch.float64))
        assert float(found) == pytest.approx(1e6 + 1e-3, rel=0, abs=1e-8)

    def test_each_factor_apart(self, dense, uploads):
        factors = make(uploads, (6, 9), [2, 2, 2])
        w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        wanted = dense.product_of_means(dense.pairs(factors), w.numpy())
        np.testing.assert_allclose(mean_factors(factors, w).product(), wanted, atol=1e-12)

    def test_of_nothing(self):
        for of in (mean, mean_factors):
            with pytest.raises(ValueError, match="at least one"):
                of([], torch.ones(0))


class TestSmallOnes:
    def test_norm(self, uploads):
        (other,) = make(uploads, (7, 5), [4])
        assert product_norm(other) == pytest.approx(float(other.product().norm()), rel=1e-12)

    def test_the_norm_of_what_nearly_cancels(self):
        """B's columns are opposite up to 1e-9: a sum of squares of Gram blocks would be off by all of it."""
        B = torch.tensor([[1.0, -1.0], [1.0, -1.0 - 1e-9]], dtype=torch.float64)
        found = product_norm(Factors(B, torch.ones(2, 3, dtype=torch.float64)))
        assert found == pytest.approx(1e-9 * 3**0.5, rel=1e-5)

    def test_idle_rows_come_from_before(self):
        """Only where B's column is zero too, and to the rank of before."""
        pair = Factors(torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 0], [0, 0], [0, 3]]))
        before = Factors(torch.ones(1, 4), torch.arange(8.0).reshape(4, 2) + 10)
        found = keep_trainable(pair, before)
        assert found.A.tolist() == [[0, 0], [12, 13], [0, 3], [16, 17]]
        assert found.B.tolist() == [[1, 0, 0, 0]]

    def test_nothing_idle_is_nothing_changed(self, uploads):
        pair, before = make(uploads, (4, 5), [2, 2])
        assert torch.equal(keep_trainable(pair, before).A, pair.A)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=7),
    dull=st.sampled_from(["none", "zero", "copies", "thin"]),
    seed=st.integers(0, 10_000),
)
def test_any_shape_and_ranks(dense, uploads, shape, ranks, dull, seed):
    ranks = ranks[:1] * len(ranks) if dull == "copies" else ranks
    factors = make(uploads, shape, ranks, seed)
    factors = factors[:1] * len(factors) if dull == "copies" else factors
    if dull in ("zero", "thin"):
        factors = [Factors(f.B * (torch.arange(f.rank) < (dull == "thin")), f.A) for f in factors]
    c = torch.rand(len(ranks), generator=uploads.generator(seed + 1), dtype=torch.float64) - 0.3
    wanted, total = dense.mean_product(dense.pairs(factors), c.numpy()), ProductSum.of(factors, c)
    np.testing.assert_allclose(float(Frame(total).total.norm()), np.linalg.norm(wanted), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(total.factors().product(), wanted, atol=1e-11)
    cut = total.truncated(min(2, *shape, sum(ranks)))
    np.testing.assert_allclose((cut.U * cut.S) @ cut.Vh, dense.truncated(wanted, len(cut.S)), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(cut.Vh @ cut.Vh.T, np.eye(len(cut.S)), atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "hira", "embedding", "hira_embedding"])
def test_fresh_factors(uploads, kind):
    """Bit for bit, as finished runs began with them: from a generator, and from torch's own."""
    found, g = fresh_factors((5, 7), 3, kind, uploads.generator(4)), uploads.generator(4)
    normal = "embedding" in kind
    wanted = torch.randn(3, 7, generator=g) if normal else (2 * torch.rand(3, 7, generator=g) - 1) / 7**0.5
    assert torch.equal(found.A, wanted)
    assert torch.equal(found.B, torch.zeros(5, 3))
    torch.manual_seed(4)
    assert torch.equal(fresh_factors((5, 7), 3, kind).A, wanted)
