"""Both routes to the fitted weights of `flora-na` meet the same minima; which is taken is a matter of cost."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import linalg
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora.adapter import Factors
from fedlora.strategies import flora_na, leastsquares, mixing
from fedlora.strategies.flora_na import FLoRANA
from fedlora.strategies.leastsquares import KEPT, Rows
from fedlora.strategies.mixing import GramProblem, Stacked, StreamedProblem, problem_of

options = FLoRANA.Options


def drawn(shape, rank, clients, drift, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    d_out, d_in = shape
    B, A = torch.randn(d_out, rank, generator=g), torch.randn(rank, d_in, generator=g)
    pairs = [
        Factors(
            (B + drift * torch.randn(d_out, rank, generator=g)).to(dtype),
            (A + drift * torch.randn(rank, d_in, generator=g)).to(dtype),
        )
        for _ in range(clients)
    ]
    raw = torch.rand(clients, generator=g, dtype=torch.float64) + 0.2
    return pairs, raw / raw.sum()


def objective(pairs, w, p, q):
    """In dense float64 arrays."""
    B, A = (np.stack([getattr(pair, name).double().numpy() for pair in pairs]) for name in "BA")
    hat_b, hat_a = np.einsum("u,uir->ir", p, B), np.einsum("u,urj->rj", q, A)
    return float(np.linalg.norm(hat_b @ hat_a - np.einsum("u,uir,urj->ij", w, B, A)) ** 2)


def by_turns(made, pairs, w, ridge=0.0, **chosen):
    return flora_na._by_turns(made([Stacked.of(pairs)], w, ridge), options(**chosen))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(3, 14), st.integers(3, 14)),
    rank=st.integers(1, 3),
    clients=st.integers(1, 40),
    drift=st.sampled_from([0.05, 0.3, 1.0]),
    ridge=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_a_sweep_of_either_route_is_the_same(shape, rank, clients, drift, ridge, dtype, seed):
    pairs, w = drawn(shape, min(rank, *shape), clients, drift, seed, dtype)
    blocks, streamed = (
        by_turns(made, pairs, w, ridge, max_sweeps=1, tolerance=0) for made in (GramProblem, StreamedProblem)
    )
    start = objective(pairs, w, w, w)
    for fit in (blocks, streamed):
        assert float(fit.objective[0]) == pytest.approx(start, rel=1e-8, abs=1e-10)
        assert (fit.objective.diff() < 0).all()
    scale = max(float(blocks.objective[0]), 1e-10)
    assert float(streamed.objective[-1]) == pytest.approx(float(blocks.objective[-1]), rel=1e-8, abs=1e-8 * scale)


@pytest.mark.parametrize("kept", [0, KEPT], ids=["in their own type", "in float64"])
@pytest.mark.parametrize(("clients", "drift"), [(60, 0.1), (60, 1.0), (300, 0.3)])
def test_the_same_optimum_with_weights_of_least_norm(monkeypatch, clients, drift, kept):
    """Of fewer clients than B has numbers and more than A has; and of more than both."""
    monkeypatch.setattr(leastsquares, "KEPT", kept)
    pairs, w = drawn((21, 17), 3, clients, drift, seed=5)
    blocks, streamed = (by_turns(made, pairs, w, max_sweeps=30) for made in (GramProblem, StreamedProblem))
    found = float(streamed.objective[-1])
    assert found == pytest.approx(float(blocks.objective[-1]), rel=1e-8)
    assert found == pytest.approx(objective(pairs, w, streamed.p, streamed.q), rel=1e-8)
    assert (streamed.objective.diff() < 0).all()
    for name in "pq":
        assert float(getattr(streamed, name).norm()) <= float(getattr(blocks, name).norm()) * (1 + 1e-3)


def test_clients_that_coincide_share_evenly_whatever_their_weights():
    """The least norm, though the search starts at the clients' weights."""
    pairs, _ = drawn((9, 7), 2, 3, 0.5, seed=1)
    w = torch.tensor([0.1, 0.2, 0.05, 0.35, 0.15, 0.15], dtype=torch.float64)
    fit = by_turns(StreamedProblem, [*pairs, *pairs], w)
    np.testing.assert_allclose(fit.p[:3], fit.p[3:], atol=1e-7)
    np.testing.assert_allclose(fit.q[:3], fit.q[3:], atol=1e-7)


def test_nearly_dependent_clients_are_solved_with_their_triangle(monkeypatch):
    """As many clients as numbers in a factor: plain LSQR takes hundreds of iterations a step, and the triangle few."""
    pairs, w = drawn((20, 20), 3, 57, 1.0, seed=3)
    monkeypatch.setattr(leastsquares, "_SLOW", 30)
    counts, lsqr = [], linalg.lsqr

    def counted(*given, **named):
        found = lsqr(*given, **named)
        counts.append(found[2])
        return found

    monkeypatch.setattr(linalg, "lsqr", counted)
    blocks, streamed = (by_turns(made, pairs, w, max_sweeps=5, tolerance=0) for made in (GramProblem, StreamedProblem))
    np.testing.assert_allclose(streamed.objective, blocks.objective, rtol=1e-8)
    assert counts[:2] == [30, counts[1]]
    assert counts.count(30) == 2  # once for each factor
    assert max(count for count in counts if count != 30) < 30


def test_no_triangle_of_dependent_clients():
    pairs, _ = drawn((6, 6), 2, 3, 1.0, seed=3)
    independent, twice = (Rows(Stacked.of(each).B) for each in (pairs, [*pairs, pairs[0]]))
    assert twice.triangle is None
    rows = torch.stack([pair.B.double().reshape(-1) for pair in pairs])
    torch.testing.assert_close(independent.triangle.T @ independent.triangle, rows @ rows.T)


@pytest.mark.parametrize("simplex", [False, True])
@pytest.mark.parametrize("solver", ["als", "adam"])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_every_option_agrees(solver, ridge, simplex):
    """Over two modules that share their weights."""
    modules = [drawn(shape, 2, 25, 0.6, seed)[0] for shape, seed in (((12, 9), 1), ((7, 15), 2))]
    w = drawn((3, 3), 1, 25, 0, seed=4)[1]
    chosen = options(solver=solver, ridge=ridge, simplex=simplex, shared=True, max_sweeps=6)
    run = flora_na._by_gradient if solver == "adam" else flora_na._by_turns
    blocks, streamed = (
        run(made([Stacked.of(pairs) for pairs in modules], w, ridge), chosen) for made in (GramProblem, StreamedProblem)
    )
    assert float(streamed.objective[-1]) == pytest.approx(float(blocks.objective[-1]), rel=1e-7)
    assert (streamed.objective.diff() < 0).all()
    assert not simplex or (float(streamed.p.sum()), streamed.p.min() >= 0) == (pytest.approx(1), True)


@pytest.mark.parametrize(
    ("shape", "rank", "clients", "made"),
    [((128, 128), 8, 10, GramProblem), ((768, 768), 8, 100, GramProblem), ((8, 8), 4, 2000, StreamedProblem)],
)
def test_the_route_is_that_of_the_lower_cost(shape, rank, clients, made):
    one = Stacked(torch.randn(1, shape[0], rank), torch.randn(1, rank, shape[1]))
    many = Stacked(one.B.expand(clients, -1, -1), one.A.expand(clients, -1, -1))
    assert mixing._streams([many]) == (made is StreamedProblem)
    if clients * rank < 100 or made is StreamedProblem:
        assert type(problem_of([many], torch.full((clients,), 1 / clients), 0.0)) is made


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operation made, and of any in float64."""

    def __init__(self):
        super().__init__()
        self.numbers = self.doubles = 0

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        made = operation(*given, **(named or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
                if tensor.dtype == torch.float64:
                    self.doubles = max(self.doubles, tensor.numel())
        return made


def test_nothing_grows_with_the_square_of_the_clients(monkeypatch):
    """No tensor is larger than the uploads, and none in float64 than a block, the layer or one number a client."""
    monkeypatch.setattr(leastsquares, "KEPT", 0)
    monkeypatch.setattr(Rows.blocks, "__defaults__", (512,))
    pairs, w = drawn((16, 12), 2, 700, 0.3, seed=2)
    with Largest() as largest:
        fit = flora_na.solve([pairs], w)
    assert len(fit.objective) > 1
    assert largest.numbers == 700 * 16 * 2
    assert largest.doubles <= max(512, 256 * (16 + 2), 700)
