"""FLoRA-NA: what the fitted weights must satisfy, beside the oracle table of test_strategies.py."""

import numpy as np
import pytest
import torch

from fedlora.adapter import Factors
from fedlora.divergence import measure
from fedlora.strategies import registry
from fedlora.strategies.base import advance
from fedlora.strategies.flora_na import solve
from fedlora.updates import Update, Updates

COUNTS = [2, 5, 12]


def combined(pairs, p, q):
    hat_b = sum(float(x) * B for x, (B, _) in zip(p, pairs, strict=True))
    return hat_b, sum(float(x) * A for x, (_, A) in zip(q, pairs, strict=True))


def objective(pairs, w, p, q, dense):
    hat_b, hat_a = combined(pairs, p, q)
    return np.linalg.norm(hat_b @ hat_a - dense.mean_product(pairs, w)) ** 2


@pytest.fixture(params=COUNTS)
def updates(request, uploads):
    return uploads.updates(request.param, seed=4, drift=0.6)


def test_objective_is_what_it_says_and_falls(dense, uploads, updates):
    w = updates.weights.numpy()
    for module in uploads.modules:
        pairs = dense.pairs(updates.factors(module))
        fit = solve(updates.factors(module), updates.weights)
        assert float(fit.objective[0]) == pytest.approx(objective(pairs, w, w, w, dense), rel=1e-9)
        assert float(fit.objective[-1]) == pytest.approx(objective(pairs, w, fit.p, fit.q, dense), rel=1e-8)
        assert (fit.objective.diff() < 0).all()
        assert len(fit.objective) > 2


def test_p_and_q_solve_their_normal_equations(dense, uploads, updates):
    """At convergence neither p nor q alone can be moved to advantage: both gradients vanish, and brute force agrees."""
    w = updates.weights.numpy()
    for module in uploads.modules:
        pairs = dense.pairs(updates.factors(module))
        fit = solve(updates.factors(module), updates.weights, max_sweeps=20_000, tolerance=1e-15)
        ideal = dense.mean_product(pairs, w)
        hat_b, hat_a = combined(pairs, fit.p, fit.q)
        by_p = np.stack([(B @ hat_a).ravel() for B, _ in pairs], axis=1)
        by_q = np.stack([(hat_b @ A).ravel() for _, A in pairs], axis=1)
        rest = (hat_b @ hat_a - ideal).ravel()
        for columns in (by_p, by_q):
            gradient = columns.T @ rest
            assert np.abs(gradient).max() < 1e-5 * np.linalg.norm(columns, axis=0).max() * np.linalg.norm(ideal)
            best = columns @ np.linalg.lstsq(columns, ideal.ravel(), rcond=None)[0]
            assert np.linalg.norm(best - ideal.ravel()) ** 2 == pytest.approx(float(fit.objective[-1]), rel=1e-9)


@pytest.mark.parametrize("sweeps", [1, 2, 7])
def test_each_sweep_is_one_of_dense_least_squares(dense, uploads, updates, sweeps):
    for module in uploads.modules:
        pairs = dense.pairs(updates.factors(module))
        p, q, falling = dense.alternating(pairs, updates.weights.numpy(), sweeps, 0)
        fit = solve(updates.factors(module), updates.weights, sweeps, 0)
        np.testing.assert_allclose(fit.p, p, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(fit.q, q, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(fit.objective, falling, rtol=1e-8)


def test_gauge_is_that_of_the_means(uploads, updates):
    state = advance(registry.make("flora-na"), uploads.state(), updates)
    for module, hat in state.adapter.factors.items():
        bar = updates.mean_factors(module)
        assert float(hat.B.norm() / hat.A.norm()) == pytest.approx(float(bar.B.norm() / bar.A.norm()), rel=1e-6)


class TestOptions:
    def run(self, uploads, **options):
        state = advance(registry.make("flora-na", options), uploads.state(), uploads.updates(5, seed=4))
        return {module: len(values["objective"]) - 1 for module, values in state.diagnostics.items()}

    def test_max_sweeps_bounds_the_sweeps(self, uploads):
        assert set(self.run(uploads, max_sweeps=2, tolerance=0).values()) == {2}

    def test_tolerance_ends_them_earlier(self, uploads):
        loose, tight = self.run(uploads, tolerance=1e-2), self.run(uploads, tolerance=1e-12, max_sweeps=1000)
        assert all(0 < loose[module] < tight[module] for module in tight)


def test_identical_clients_share_evenly(uploads):
    """The system is singular: the minimum-norm solution does not prefer one of them."""
    one = uploads.adapter(0)
    same = Updates.collect(Update(u, 10, one) for u in range(4))
    new = advance(registry.make("flora-na"), uploads.state(), same)
    for values in new.diagnostics.values():
        torch.testing.assert_close(values["p"], torch.full((4,), 0.25, dtype=torch.float64))
        torch.testing.assert_close(values["q"], torch.full((4,), 0.25, dtype=torch.float64))
        assert float(values["objective"][-1]) < 1e-9


def with_factors(updates, change):
    """The updates with `change(client index, factors)` made to every module."""
    adapters = tuple(
        type(a)({m: change(u, f) for m, f in a.factors.items()}, a.head) for u, a in enumerate(updates.adapters)
    )
    return Updates(updates.clients, adapters, updates.weights)


@pytest.mark.parametrize(
    "change",
    [
        lambda u, f: Factors(f.B * torch.tensor([1.0, 0, 0]), f.A),
        lambda u, f: Factors(f.B * (u != 1), f.A),
        lambda u, f: Factors(f.B, f.A * (u != 1)),
        lambda u, f: Factors(f.B * (u == 1), f.A),
        lambda u, f: Factors(f.B * 1e-4, f.A),
    ],
    ids=["rank-one", "one-zero-B", "one-zero-A", "only-one-learned", "tiny"],
)
def test_degenerate_uploads_stay_finite_and_no_worse_than_fedit(uploads, updates, change):
    updates = with_factors(updates, change)
    state = uploads.state()
    fitted, plain = (advance(registry.make(name), state, updates) for name in ("flora-na", "fedit"))
    assert all(torch.isfinite(tensor).all() for tensor in fitted.adapter.tensors().values())
    rho = [measure(updates, [new.adapter] * len(updates)).rho for new in (fitted, plain)]
    assert rho[0] <= rho[1] + 1e-6


def test_effective_clients_are_seen(uploads, updates):
    """Far-apart clients: the optimum leans on few of them, and the diagnostics say so."""
    new = advance(registry.make("flora-na"), uploads.state(), updates)
    mixing = {module: values["p"] for module, values in new.diagnostics.items()}
    found = measure(updates, [new.adapter] * len(updates), mixing)
    for module, p in mixing.items():
        share = (p.abs() / p.abs().sum()).numpy()
        assert found.modules[module].effective_clients == pytest.approx(1 / (share**2).sum())
    plain = measure(updates, [new.adapter] * len(updates)).effective_clients
    assert plain == pytest.approx(1 / float(updates.weights.square().sum()))
