"""FLoRA-NA: what the fitted weights must satisfy, beside the table of test_against_dense.py."""

import numpy as np
import pytest
import torch

from fedlora.adapter import Factors
from fedlora.adapter.divergence import measure
from fedlora.adapter.updates import Update, Updates
from fedlora.strategies import registry
from fedlora.strategies.flora_na import FLoRANA, solve
from fedlora.strategies.simplex import minimise_on_simplex, project_to_simplex
from fedlora.strategies.step import advance

COUNTS = [2, 5, 12]
options = FLoRANA.Options


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
        fit = solve([updates.factors(module)], updates.weights)
        assert float(fit.objective[0]) == pytest.approx(objective(pairs, w, w, w, dense), rel=1e-9)
        assert float(fit.objective[-1]) == pytest.approx(objective(pairs, w, fit.p, fit.q, dense), rel=1e-8)
        assert (fit.objective.diff() < 0).all()
        assert len(fit.objective) > 2


def test_p_and_q_solve_their_normal_equations(dense, uploads, updates):
    """At convergence neither p nor q alone can be moved to advantage: both gradients vanish, and brute force agrees."""
    w = updates.weights.numpy()
    for module in uploads.modules:
        pairs = dense.pairs(updates.factors(module))
        fit = solve([updates.factors(module)], updates.weights, options(max_sweeps=20_000, tolerance=1e-15))
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
        fit = solve([updates.factors(module)], updates.weights, options(max_sweeps=sweeps, tolerance=0))
        np.testing.assert_allclose(fit.p, p, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(fit.q, q, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(fit.objective, falling, rtol=1e-8)


def test_gauge_is_that_of_the_means(uploads, updates):
    state = advance(registry.make("flora-na"), uploads.state(), updates)
    for module, hat in state.adapter.factors.items():
        bar = updates.mean_factors(module)
        assert float(hat.B.norm() / hat.A.norm()) == pytest.approx(float(bar.B.norm() / bar.A.norm()), rel=1e-6)


class TestOptions:
    def run(self, uploads, **chosen):
        state = advance(registry.make("flora-na", chosen), uploads.state(), uploads.updates(5, seed=4, drift=0.6))
        return state.diagnostics

    def sweeps(self, uploads, **chosen):
        return {module: len(values["objective"]) - 1 for module, values in self.run(uploads, **chosen).items()}

    def test_max_sweeps_bounds_the_sweeps(self, uploads):
        assert set(self.sweeps(uploads, max_sweeps=2, tolerance=0).values()) == {2}

    def test_tolerance_ends_them_earlier(self, uploads):
        loose, tight = self.sweeps(uploads, tolerance=1e-2), self.sweeps(uploads, tolerance=1e-12, max_sweeps=1000)
        assert all(0 < loose[module] < tight[module] for module in tight)

    def test_shared_weights_are_one_problem_over_all_modules(self, dense, uploads):
        """One p and q; the objective adds up, and cannot be below the sum of the modules' own."""
        shared, apart = self.run(uploads, shared=True), self.run(uploads)
        updates = uploads.updates(5, seed=4, drift=0.6)
        w = updates.weights.numpy()
        p, q = (shared["narrow"][name].numpy() for name in "pq")
        assert all(torch.equal(values["p"], shared["narrow"]["p"]) for values in shared.values())
        total = sum(objective(dense.pairs(updates.factors(m)), w, p, q, dense) for m in uploads.modules)
        assert float(shared["narrow"]["objective"][-1]) == pytest.approx(total, rel=1e-8)
        assert total >= sum(float(values["objective"][-1]) for values in apart.values()) - 1e-6

    def test_ridge_draws_to_the_clients_weights(self, uploads):
        weights = uploads.updates(5).weights
        away = [(self.run(uploads, ridge=ridge)["narrow"]["p"] - weights).norm() for ridge in (0, 0.1, 10, 1e6)]
        assert away[0] > away[1] > away[2] > away[3]
        assert away[3] < 1e-4

    @pytest.mark.parametrize("solver", ["als", "adam"])
    def test_simplex_gives_weights_of_a_mean(self, uploads, solver):
        for values in self.run(uploads, simplex=True, solver=solver).values():
            for name in "pq":
                assert (values[name] >= 0).all()
                assert float(values[name].sum()) == pytest.approx(1, abs=1e-9)

    def test_gradient_descent_nears_the_least_squares(self, uploads):
        slow, exact = self.run(uploads, solver="adam", max_sweeps=1000), self.run(uploads)
        for module, values in slow.items():
            best = float(exact[module]["objective"][-1])
            assert float(values["objective"][-1]) <= best + 0.2 * (float(values["objective"][0]) - best)

    @pytest.mark.parametrize("simplex", [False, True])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("ridge", [0, 0.1])
    @pytest.mark.parametrize("solver", ["als", "adam"])
    def test_under_every_option_at_most_fedit(self, uploads, solver, ridge, shared, simplex):
        chosen = {"solver": solver, "ridge": ridge, "shared": shared, "simplex": simplex, "max_sweeps": 20}
        updates, state = uploads.updates(5, seed=4, drift=0.6), uploads.state()
        fitted = advance(registry.make("flora-na", chosen), state, updates)
        plain = advance(registry.make("fedit"), state, updates)
        rho = [measure(updates, [new.adapter] * 5, common=True).rho for new in (fitted, plain)]
        assert rho[0] <= rho[1] + 1e-6
        for values in fitted.diagnostics.values():
            assert (values["objective"].diff() < 0).all()


class TestSimplex:
    @pytest.mark.parametrize(
        ("point", "nearest"),
        [([0.2, 0.8], [0.2, 0.8]), ([2.0, 0.0], [1, 0]), ([1.0, 1.0], [0.5, 0.5]), ([-1, 0.5, 0.9], [0, 0.3, 0.7])],
    )
    def test_projection_by_hand(self, point, nearest):
        found = project_to_simplex(torch.tensor(point, dtype=torch.float64))
        assert found.tolist() == pytest.approx(nearest)

    def test_minimum_satisfies_its_conditions(self, uploads):
        """The gradient is equal where weights are positive, and no smaller where they are zero."""
        for seed in range(5):
            g = uploads.generator(seed)
            M, h = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((8, 6), (6,)))
            H = M.T @ M
            x = minimise_on_simplex(H, h, torch.full((6,), 1 / 6, dtype=torch.float64))
            gradient = H @ x - h
            active = x > 1e-9
            assert float(x.sum()) == pytest.approx(1)
            assert float(gradient[active].max() - gradient[active].min()) < 1e-5
            assert (gradient >= gradient[active].min() - 1e-5).all()


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
    rho = [measure(updates, [new.adapter] * len(updates), common=True).rho for new in (fitted, plain)]
    assert rho[0] <= rho[1] + 1e-6


def test_effective_clients_are_seen(uploads, updates):
    """Far-apart clients: the optimum leans on few of them, and the diagnostics say so."""
    new = advance(registry.make("flora-na"), uploads.state(), updates)
    mixing = {module: values["p"] for module, values in new.diagnostics.items()}
    found = measure(updates, [new.adapter] * len(updates), mixing, common=True)
    for module, p in mixing.items():
        share = (p.abs() / p.abs().sum()).numpy()
        assert found.modules[module].effective_clients == pytest.approx(1 / (share**2).sum())
    plain = measure(updates, [new.adapter] * len(updates), common=True).effective_clients
    assert plain == pytest.approx(1 / float(updates.weights.square().sum()))
