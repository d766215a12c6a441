"""What must hold whatever clients send: drawn shapes, ranks, weights and degenerate factors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rosters import entries

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.updates import Update, Updates
from fedlora.strategies import registry

quietly = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
KINDS = ["random", "identical", "zero B", "rank one", "one learned", "tiny", "zero A"]


def degenerate(adapter: Adapter, kind: str, client: int) -> Adapter:
    """An upload with little or nothing in it."""

    def change(pair: Factors) -> Factors:
        first = torch.arange(pair.rank) == 0
        match kind:
            case "zero B":
                return Factors(0 * pair.B, pair.A)
            case "rank one":
                return Factors(pair.B * first, pair.A)
            case "one learned":
                return Factors(pair.B * (client == 1), pair.A)
            case "tiny":
                return Factors(1e-6 * pair.B, pair.A)
            case "zero A":
                return Factors(pair.B, 0 * pair.A)
        return pair

    return adapter.with_factors({module: change(pair) for module, pair in adapter.factors.items()})


@st.composite
def played(draw, names):
    """(name, shape, rank, client count, mixed, kind, weights, seed)."""
    name = draw(st.sampled_from(names))
    shape = draw(st.tuples(st.integers(2, 18), st.integers(2, 18)))
    count = draw(st.integers(1, 7))
    rank = draw(st.integers(1, min(3, *shape)))
    mixed = draw(st.booleans()) and not registry.find(name).traits.one_rank and rank == 3
    weights = draw(st.lists(st.sampled_from([0, 0, 1, 2.5, 40]), min_size=count, max_size=count).filter(any))
    return name, shape, rank, mixed, draw(st.sampled_from(KINDS)), weights, draw(st.integers(0, 999))


def play(rounds, case):
    name, shape, rank, mixed, kind, weights, seed = case
    strategy = rounds.make(name)
    assume(strategy.refuses_rank(rank) is None)
    state = rounds.state(strategy, mixed, modules={"m": shape}, rank=rank)
    count = 1 if strategy.traits.pools_data else len(weights)
    updates = []
    for client, weight in enumerate(weights[:count]):
        twin = client if kind != "identical" or mixed else 0
        upload = rounds.train(strategy, state, twin, seed)
        if "A" in strategy.plan(1).trains or kind != "zero A":
            upload = degenerate(upload, kind, client)
        updates.append(Update(client, 1 if count == 1 else weight, upload))
    return rounds.run(strategy, state, Updates.collect(updates))


@quietly
@given(st.data())
def test_finite_and_consistent(rounds, data):
    """Every number is finite; R = error² + dispersion for a common broadcast; ρ is the weighted root mean square of the
    clients'; no broadcast without base update is below the floor."""
    case = data.draw(played(rounds.names))
    found = play(rounds, case)
    for broadcast in found.broadcasts:
        broadcast.check_finite(case[0], "never")
    module = found.measured().modules["m"]
    assert all(np.isfinite([module.R, module.P, module.Q, module.dispersion, module.error2, module.ideal2]))
    w, size = found.updates.weights.tolist(), module.ideal2 + module.error2 + 1e-300
    if not module.by_client:
        assert pytest.approx(module.error2 + module.dispersion, rel=1e-9) == module.R
    elif module.ideal2 > 0:
        rms = sum(x * module.by_client[c] ** 2 for x, c in zip(w, found.updates.clients, strict=True)) ** 0.5
        assert module.rho == pytest.approx(rms, rel=1e-9)
    if not found.strategy.traits.changes_base:
        assert module.error2 >= module.tail2 - 1e-6 * size
    assert module.effective_clients <= len(w) + 1e-9


def scale2(found) -> float:
    """The square of what rounding is relative to: the size of the factors that are combined, not of their sum."""
    uploads = found.sent.factors("m")
    sizes = [float(f.B.norm() * f.A.norm()) for f in uploads]
    return sum(w * size for w, size in zip(found.updates.weights.tolist(), sizes, strict=True)) ** 2


@quietly
@given(st.data())
def test_orderings_and_exactness(rounds, data):
    """Exact strategies lose nothing, svd has the smallest error of all adapters, fitted ones at most fedit's."""
    case = data.draw(played(["fedit"]))
    plain = play(rounds, case)
    slack = 1e-6 * scale2(plain) ** 0.5
    error = {}
    for name in ("fedit", "svd", "flexlora", "flora-na", "lora-fair", "flora", "fedex-lora", "oracle"):
        found = rounds.run(name, plain.before, plain.updates).measured().modules["m"]
        error[name] = found.error2**0.5
        tail = found.tail2**0.5
    for name in ("flora", "fedex-lora", "oracle"):
        assert error[name] <= slack
    assert error["svd"] == pytest.approx(tail, abs=slack)
    assert error["flexlora"] == pytest.approx(tail, abs=slack)
    for name in ("flora-na", "lora-fair"):
        assert error["svd"] - slack <= error[name] <= error["fedit"] + slack


@quietly
@given(st.data())
def test_exact_with_frozen_factors(rounds, data):
    found = play(rounds, data.draw(played(["ffa-lora", "rolora", "fedsvd"])))
    if not found.before.ranks:
        assert found.measured().modules["m"].error2 <= 1e-12 * scale2(found)


@pytest.mark.parametrize("entry", entries())
def test_two_hundred_clients(rounds, entry):
    """As many as a cross-device round has: no strategy forms anything that grows with their square but Gram blocks."""
    name, mixed = entry
    strategy = rounds.make(name, **({"max_sweeps": 2} if name == "flora-na" else {}))
    state = rounds.state(strategy, mixed, modules={"m": (12, 9)})
    state = replace(state, ranks={c: r for c, r in state.ranks.items() if c < 200})
    found = rounds.run(strategy, state, rounds.uploaded(strategy, state, 200))
    module = found.measured().modules["m"]
    assert np.isfinite(module.rho)
    if strategy.traits.exact and not mixed:
        assert module.rho < 1e-5
    assert len(found.broadcasts) == (1 if strategy.traits.pools_data else 200)
    base = found.after.base.modules.get("m")
    assert base is None or base.rank <= 9
