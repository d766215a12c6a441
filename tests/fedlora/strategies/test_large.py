"""Strategies of leading directions on layers that are too large for full decompositions, against dense float64; and on
which device all of them compute."""

from functools import cache

import numpy as np
import pytest
import torch
from rosters import NAMES

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.factors import ProductSum
from fedlora.adapter.updates import Update, Updates
from fedlora.strategies import fed_sb, leastsquares, mixing, registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.state import tensors
from fedlora.strategies.step import advance, measure_round

SIZES = {"stacked": ((520, 440), 100), "dense": ((450, 400), 120), "dense, wide": ((400, 450), 120)}
"""Shape of a layer and clients of rank 4: the joint rank is below the smaller side, or above."""
SCALING = 1.5


def situation(shape, clients, ranks=None):
    """The state before, and uploads of clients around common factors."""
    g = torch.Generator().manual_seed(3)
    B, A = torch.randn(shape[0], 4, generator=g), torch.randn(4, shape[1], generator=g)
    adapters = []
    for u in range(clients):
        noise = torch.randn(shape[0], 4, generator=g), torch.randn(4, shape[1], generator=g)
        pair = Factors(B + 0.2 * noise[0], A + 0.2 * noise[1])
        adapters.append(Adapter({"m": pair.at_rank((ranks or {}).get(u, 4))}))
    updates = Updates.collect(Update(u, 1 + u % 3, adapter) for u, adapter in enumerate(adapters))
    start = Adapter({"m": Factors(torch.zeros(shape[0], 4), A)})
    return ServerState(start, scaling=SCALING, ranks=ranks or {}), updates


def mean_product(updates):
    weights, pairs = updates.weights.numpy(), updates.factors("m")
    return sum(w * pair.B.double().numpy() @ pair.A.double().numpy() for w, pair in zip(weights, pairs, strict=True))


@cache
def dense(shape, clients, lowest=4):
    """The state before, uploads of which two are of the lowest rank, their mean product, and its decomposition."""
    state, updates = situation(shape, clients, {0: lowest, 7: lowest} if lowest < 4 else None)
    ideal = mean_product(updates)
    return state, updates, ideal, np.linalg.svd(ideal, full_matrices=False)


@pytest.fixture
def no_decomposition(monkeypatch):
    monkeypatch.setattr(ProductSum, "truncated", lambda *_: pytest.fail("a full decomposition was taken"))


def held(state):
    """Adapter and base update as one matrix, over the scaling."""
    return state.adapter.factors["m"].product().double() + state.base_step.modules["m"].product().double() / SCALING


@pytest.mark.usefixtures("no_decomposition")
@pytest.mark.parametrize(("shape", "clients"), SIZES.values(), ids=SIZES.keys())
class TestAgainstDense:
    @pytest.mark.parametrize("energy", [0.6, 0.95])
    @pytest.mark.parametrize("name", ["florist", "fedmomentum"])
    def test_a_share_of_the_energy(self, shape, clients, name, energy):
        state, updates, _, (U, values, Vh) = dense(shape, clients)
        count = int(np.argmax(np.cumsum(values**2) >= energy * (values**2).sum())) + 1
        kept = max(count, 4) if name == "fedmomentum" else count
        after = advance(registry.make(name, {"energy": energy}), state, updates)
        step = after.base_step.modules.get("m")
        assert (0 if step is None else step.rank) == (kept - 4 if name == "fedmomentum" else kept)
        found = held(after) if step is not None else after.adapter.factors["m"].product().double()
        np.testing.assert_allclose(found, U[:, :kept] * values[:kept] @ Vh[:kept], atol=1e-6 * values[0])

    @pytest.mark.parametrize("lowest", [4, 2])
    def test_the_control_that_loses_nothing(self, shape, clients, lowest):
        state, updates, ideal, (U, values, Vh) = dense(shape, clients, lowest)
        after = advance(registry.make("oracle"), state, updates)
        np.testing.assert_allclose(held(after), ideal, atol=1e-6 * values[0])
        pair = after.adapter.factors["m"]
        np.testing.assert_allclose(pair.product(), U[:, :lowest] * values[:lowest] @ Vh[:lowest], atol=1e-5 * values[0])
        assert not pair.B[:, lowest:].any()
        np.testing.assert_allclose(pair.A[lowest:] @ pair.A[lowest:].T, np.eye(4 - lowest), atol=1e-5)
        joint = sum(pair.rank for pair in updates.factors("m")) - lowest
        assert after.base_step.wire_bytes() == 4 * min(joint * sum(shape), shape[0] * shape[1])
        assert measure_round(registry.make("oracle"), after, updates).rho < 1e-6


def test_fixed_factors_of_a_large_layer():
    """fed-sb: the leading directions of the base weight."""
    g = torch.Generator().manual_seed(5)
    sides = (torch.linalg.qr(torch.randn(d, 500, generator=g, dtype=torch.float64)).Q for d in (600, 500))
    left, right = sides
    values = torch.arange(1, 501, dtype=torch.float64) ** -0.5
    weight = (left * values) @ right.T
    found = fed_sb._leading(weight.float(), 8)
    assert (found.B.shape, found.A.shape) == ((600, 8), (8, 500))
    np.testing.assert_allclose(found.B.T.double() @ weight @ found.A.T.double(), torch.diag(values[:8]), atol=1e-5)
    assert not torch.equal(found.A, torch.linalg.svd(weight, full_matrices=False)[2][:8].float())


def check_device(state, updates, name, **options):
    """Where new tensors have no numbers unless told their place, results are the same."""
    strategy = registry.make(name, options)
    with torch.device("meta"):
        after = advance(strategy, state, updates)
        measured = measure_round(strategy, after, updates)
    again = advance(strategy, state, updates)
    assert measured == measure_round(strategy, again, updates)
    found, wanted = tensors(after), tensors(again)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("shape", "clients"), [((24, 20), 3), SIZES["stacked"], SIZES["dense"]], ids=["small", "stacked", "dense"]
)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_made_where_the_factors_are_not(name, shape, clients):
    check_device(*situation(shape, clients), name)


@pytest.mark.parametrize("streams", [False, True], ids=["blocks", "streamed"])
@pytest.mark.parametrize("options", [{"simplex": True}, {"solver": "adam"}, {"ridge": 0.1}, {}])
def test_nothing_of_fitted_weights_either(monkeypatch, streams, options):
    monkeypatch.setattr(mixing, "_streams", lambda _: streams)
    for name, value in (("KEPT", 0), ("_SLOW", 1)):
        monkeypatch.setattr(leastsquares, name, value)
    check_device(*situation((24, 20), 5), "flora-na", max_sweeps=2, **options)
