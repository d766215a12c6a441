"""Sums of products in factor space against dense numpy, on every route (either side reduced, both, neither)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import Factors
from fedlora.factors import Frame, mean, mean_factors, truncated_svd

ROUTES = {
    "both reduced": ((40, 23), [3, 3]),
    "right dense": ((40, 23), [3] * 8),
    "left dense": ((17, 53), [3] * 8),
    "both dense": ((9, 14), [3] * 8),
    "exactly as wide": ((12, 15), [3] * 4),
    "different ranks": ((19, 31), [1, 4, 2]),
    "one client": ((8, 5), [3]),
}


def make(uploads, shape, ranks, seed=0, dtype=torch.float64):
    generator = uploads.generator(seed)
    return [uploads.factors(shape, rank, generator, dtype) for rank in ranks]


@pytest.fixture(params=ROUTES.values(), ids=ROUTES.keys())
def case(request, uploads):
    """(factors, coefficients of mixed sign)."""
    shape, ranks = request.param
    factors = make(uploads, shape, ranks)
    return factors, torch.linspace(-0.7, 1.3, len(factors), dtype=torch.float64)


class TestFrame:
    def test_keeps_norms_inner_products_and_singular_values(self, dense, case):
        factors, c = case
        frame, wanted = Frame(factors), dense.mean_product(dense.pairs(factors), c.numpy())
        inside = frame.combine(c)
        np.testing.assert_allclose(inside.norm(), np.linalg.norm(wanted), rtol=1e-12)
        k = min(inside.shape)
        np.testing.assert_allclose(
            torch.linalg.svdvals(inside), np.linalg.svd(wanted, compute_uv=False)[:k], atol=1e-11
        )
        for index, (B, A) in enumerate(dense.pairs(factors)):
            assert float((frame.product(index) * inside).sum()) == pytest.approx(
                float((B @ A * wanted).sum()), rel=1e-9
            )

    def test_lift_gives_the_matrix_back(self, dense, case):
        factors, c = case
        frame = Frame(factors)
        inside = frame.combine(c)
        left, right = frame.lift(inside, torch.eye(inside.shape[1], dtype=torch.float64))
        np.testing.assert_allclose(left @ right.T, dense.mean_product(dense.pairs(factors), c.numpy()), atol=1e-11)

    def test_combines_the_first_ones_only(self, dense, uploads):
        factors = make(uploads, (40, 23), [2, 3, 4])
        frame = Frame(factors)
        wanted = dense.mean_product(dense.pairs(factors[:2]), [0.3, 0.7])
        assert float(frame.combine([0.3, 0.7]).norm()) == pytest.approx(np.linalg.norm(wanted), rel=1e-12)
        difference = frame.combine([0.3, 0.7]) - frame.product(2)
        B, A = dense.pairs(factors)[2]
        assert float(difference.norm()) == pytest.approx(np.linalg.norm(wanted - B @ A), rel=1e-12)

    def test_is_no_larger_than_the_joint_rank(self, uploads):
        """Nothing of d_out × d_in is formed while Σr is below both."""
        frame = Frame(make(uploads, (400, 300), [2, 3]))
        assert frame.combine([1.0, 1.0]).shape == (5, 5)

    def test_works_in_float64_whatever_it_is_given(self, uploads):
        assert Frame(make(uploads, (8, 9), [2], dtype=torch.float32)).product(0).dtype == torch.float64


class TestTruncatedSVD:
    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_is_the_best_approximation(self, dense, case, rank):
        factors, c = case
        ideal = dense.mean_product(dense.pairs(factors), c.numpy())
        cut = truncated_svd(factors, c, rank)
        assert (cut.U.shape, cut.S.shape, cut.Vh.shape) == ((len(ideal), rank), (rank,), (rank, ideal.shape[1]))
        np.testing.assert_allclose((cut.U * cut.S) @ cut.Vh, dense.truncated(ideal, rank), atol=1e-10)
        left_out = np.linalg.svd(ideal, compute_uv=False)[rank:]
        np.testing.assert_allclose(cut.tail, left_out[: len(cut.tail)], atol=1e-10)
        np.testing.assert_allclose(cut.U.T @ cut.U, np.eye(rank), atol=1e-12)
        np.testing.assert_allclose(cut.Vh @ cut.Vh.T, np.eye(rank), atol=1e-12)

    def test_balanced_by_hand(self):
        """B = (0, 3)ᵀ, A = (0, 0, 12): one singular value, 36, so that each side has norm 6."""
        factors = Factors(torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0, 0.0, 12.0]]))
        split = truncated_svd([factors], [1.0], 1).balanced()
        assert split.B.abs().flatten().tolist() == pytest.approx([0, 6])
        assert split.A.abs().flatten().tolist() == pytest.approx([0, 0, 6])
        torch.testing.assert_close(split.product().float(), factors.product())

    def test_directions_without_learning_stay_trainable(self, uploads):
        """B of rank one in three columns: two directions are idle, and rounding must not make them look learned."""
        (pair,) = make(uploads, (11, 7), [3])
        flat = Factors(pair.B[:, :1] @ torch.ones(1, 3, dtype=torch.float64), pair.A)
        split = truncated_svd([flat, flat], [0.5, 0.5], 3).balanced()
        assert (split.B != 0).any(dim=0).tolist() == [True, False, False]
        torch.testing.assert_close(split.A[1:] @ split.A[1:].T, torch.eye(2, dtype=torch.float64))
        torch.testing.assert_close(split.product(), flat.product())

    def test_of_nothing(self):
        zero = Factors(torch.zeros(5, 2), torch.ones(2, 4))
        split = truncated_svd([zero, zero], [0.5, 0.5], 2).balanced()
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


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=7),
    seed=st.integers(0, 10_000),
)
def test_any_shape_and_ranks(dense, uploads, shape, ranks, seed):
    factors = make(uploads, shape, ranks, seed)
    c = torch.rand(len(ranks), generator=uploads.generator(seed + 1), dtype=torch.float64) - 0.3
    wanted = dense.mean_product(dense.pairs(factors), c.numpy())
    np.testing.assert_allclose(float(Frame(factors).combine(c).norm()), np.linalg.norm(wanted), rtol=1e-9, atol=1e-12)
    rank = min(2, *shape, sum(ranks))
    cut = truncated_svd(factors, c, rank)
    np.testing.assert_allclose((cut.U * cut.S) @ cut.Vh, dense.truncated(wanted, rank), rtol=1e-6, atol=1e-8)
