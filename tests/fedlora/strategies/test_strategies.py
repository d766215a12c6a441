"""Every strategy against the dense oracle, and the properties of ALGORITHMS §5 and the mistakes of §6 that apply."""

import copy

import numpy as np
import pytest
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.divergence import measure
from fedlora.runfolder import RunFolder
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState, advance
from fedlora.updates import Update, Updates

BUILTIN = ["fedit", "ffa-lora", "flora-na", "svd", "local"]
SHARED = [name for name in BUILTIN if name != "local"]
COUNTS = [1, 2, 5, 12]


def step(name, state, updates, **options):
    """(strategy, new state, what each client of `updates` restarts from)."""
    strategy = registry.make(name, options)
    new = advance(strategy, state, updates)
    return strategy, new, [strategy.broadcast(new, client) for client in updates.clients]


def products(broadcasts, module, scaling=1.0):
    return [scaling * (b.factors[module].B.double() @ b.factors[module].A.double()).numpy() for b in broadcasts]


def situation(uploads, name, count, seed=0, drift=1.0):
    """A state and uploads that strategy `name` can meet: with ffa-lora every client still has the state's A."""
    state = uploads.state()
    return state, uploads.updates(count, seed, drift, state.adapter if name == "ffa-lora" else None)


def expected(dense, name, pairs, w, rank):
    """The dense product that each client should restart from."""
    match name:
        case "fedit":
            return [dense.product_of_means(pairs, w)] * len(w)
        case "ffa-lora":
            return [dense.mean_product(pairs, w)] * len(w)
        case "flora-na":
            return [dense.flora_na(pairs, w)] * len(w)
        case "svd":
            return [dense.truncated(dense.mean_product(pairs, w), rank)] * len(w)
        case "local":
            return [B @ A for B, A in pairs]


def close(actual, wanted, tolerance=1e-5):
    """Relative in the Frobenius norm."""
    assert np.linalg.norm(actual - wanted) <= tolerance * max(np.linalg.norm(wanted), 1e-30)


def test_the_table_covers_every_registered_strategy():
    assert registry.names()[: len(BUILTIN)] == BUILTIN


@pytest.mark.parametrize("drift", [0.2, 1.0], ids=["related", "unrelated"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", BUILTIN)
class TestAgainstDense:
    def test_effective_updates(self, dense, uploads, name, count, drift):
        """Property 8: s·B̂Â of every module and client as the oracle has it, to 1e-5."""
        state, updates = situation(uploads, name, count, drift=drift)
        w = updates.weights.numpy()
        _, _, broadcasts = step(name, state, updates)
        for module in uploads.modules:
            wanted = expected(dense, name, dense.pairs(updates.factors(module)), w, uploads.rank)
            for actual, want in zip(products(broadcasts, module, dense.scaling), wanted, strict=True):
                assert actual.shape == uploads.modules[module]
                close(actual, dense.scaling * want)

    def test_divergence_as_measured(self, dense, uploads, name, count, drift):
        state, updates = situation(uploads, name, count, drift=drift)
        w = updates.weights.numpy()
        _, _, broadcasts = step(name, state, updates)
        measured = measure(updates, broadcasts)
        for module in uploads.modules:
            ideal = dense.mean_product(dense.pairs(updates.factors(module)), w)
            found = measured.modules[module]
            assert found.rho == pytest.approx(dense.rho(products(broadcasts, module), ideal, w), abs=1e-7)
            assert found.floor == pytest.approx(dense.floor(ideal, uploads.rank), abs=1e-7)

    def test_stored_as_sent(self, uploads, name, count, drift):
        """fp32, with the modules, ranks and shapes that the clients have."""
        state, updates = situation(uploads, name, count, drift=drift)
        _, new, broadcasts = step(name, state, updates)
        assert new.round == state.round + 1
        for broadcast in broadcasts:
            broadcast.check_like(state.adapter, name)
            assert {tensor.dtype for tensor in broadcast.tensors().values()} == {torch.float32}


@pytest.mark.parametrize("name", BUILTIN)
class TestProperties:
    @pytest.mark.parametrize("count", [1, 4])
    def test_identical_clients_keep_their_weights(self, dense, uploads, name, count):
        """Property 1."""
        state, one = situation(uploads, name, 1)
        same = Updates.collect(Update(u, 3 + 5 * u, one.adapters[0]) for u in range(count))
        _, _, broadcasts = step(name, state, same)
        for module in uploads.modules:
            (own,) = products(one.adapters, module)
            for actual in products(broadcasts, module):
                close(actual, own, 1e-6)
        assert measure(same, broadcasts).rho < 1e-6

    def test_client_order_does_not_matter(self, uploads, name):
        """Property 2: the order of arrival not at all, the numbers clients go by no more than rounding."""
        state, _ = situation(uploads, name, 5)
        shared = state.adapter if name == "ffa-lora" else None
        arrived = uploads.list(5, shared_a=shared)
        renumbered = [Update(4 - u.client, u.examples, u.adapter) for u in arrived]
        one, other, new = (
            step(name, state, Updates.collect(x))[2]
            for x in (arrived, reversed(arrived), renumbered[::2] + renumbered[1::2])
        )
        for module in uploads.modules:
            for a, b, c in zip(*(products(x, module) for x in (one, other, new[::-1])), strict=True):
                assert np.array_equal(a, b)
                close(c, a)
        torch.testing.assert_close(new[0].head, one[4].head)

    @pytest.mark.parametrize("chosen", [0, 2])
    def test_a_client_with_all_the_examples_decides(self, dense, uploads, name, chosen):
        """Property 2: weights (1, 0, …)."""
        state, _ = situation(uploads, name, 3)
        given = uploads.list(3, shared_a=state.adapter if name == "ffa-lora" else None)
        updates = Updates.collect(Update(u.client, 50 * (u.client == chosen), u.adapter) for u in given)
        _, _, broadcasts = step(name, state, updates)
        for module in uploads.modules:
            close(products(broadcasts, module)[chosen], products(updates.adapters, module)[chosen], 1e-6)
        assert measure(updates, broadcasts).rho < 1e-6

    def test_pure(self, uploads, name):
        """Neither argument changes, and what came before does not matter."""
        state, updates = situation(uploads, name, 5)
        kept = copy.deepcopy((state, updates))
        strategy = registry.make(name)
        first = strategy.aggregate(state, updates)
        strategy.aggregate(first, situation(uploads, name, 2, seed=7)[1])
        again, fresh = strategy.aggregate(state, updates), registry.make(name).aggregate(*kept)
        same(state.adapter, kept[0].adapter)
        assert (state.personal, state.diagnostics, state.round) == ({}, {}, 0)
        assert torch.equal(updates.weights, kept[1].weights)
        for before, after in zip(kept[1].adapters, updates.adapters, strict=True):
            same(before, after)
        for other in (again, fresh):
            for client in (*updates.clients, 77):
                same(strategy.broadcast(first, client), strategy.broadcast(other, client))

    def test_a_client_that_was_not_there_starts_from_the_global_adapter(self, uploads, name):
        state, updates = situation(uploads, name, 2)
        strategy, new, _ = step(name, state, updates)
        same(strategy.broadcast(new, 9), new.adapter)

    def test_state_survives_the_disk(self, uploads, name, tmp_path):
        state, updates = situation(uploads, name, 3)
        strategy, new, broadcasts = step(name, state, updates)
        folder = RunFolder(tmp_path)
        folder.write_state(new, {"seconds": 0.5})
        read = folder.read_state(1)
        assert read.round == 1
        assert folder.read_record("rounds/001/state")["seconds"] == 0.5
        same(read.adapter, new.adapter)
        assert read.personal.keys() == new.personal.keys()
        for client, broadcast in zip(updates.clients, broadcasts, strict=True):
            same(strategy.broadcast(read, client), broadcast)
        assert read.diagnostics.keys() == new.diagnostics.keys()
        for module, values in new.diagnostics.items():
            assert values.keys() == read.diagnostics[module].keys()
            assert all(torch.equal(value, read.diagnostics[module][key]) for key, value in values.items())
        again, there = advance(strategy, read, updates), advance(strategy, new, updates)
        same(strategy.broadcast(again, 0), strategy.broadcast(there, 0))

    def test_describes_itself(self, name):
        strategy = registry.make(name)
        assert strategy.name == name
        assert strategy.summary
        assert strategy.source
        assert strategy.personal == (name == "local")
        assert strategy.plan(1).sends <= strategy.plan(1).trains


def same(one: Adapter, other: Adapter):
    mine, theirs = one.tensors(), other.tensors()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("drift", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("count", COUNTS)
def test_divergences_are_ordered(uploads, count, drift):
    """Property 3, by module and for the model, with fp32 rounding for slack."""
    state, updates = situation(uploads, "fedit", count, seed=3, drift=drift)
    fedit, flora_na, svd = (measure(updates, step(name, state, updates)[2]) for name in ("fedit", "flora-na", "svd"))
    for pick in (lambda d: d, *(lambda d, m=m: d.modules[m] for m in uploads.modules)):
        assert pick(svd).rho == pytest.approx(pick(svd).floor, abs=1e-6)
        assert pick(svd).rho <= pick(flora_na).rho + 1e-6
        assert pick(flora_na).rho <= pick(fedit).rho + 1e-6
    if count > 1:
        assert flora_na.rho < fedit.rho


@pytest.mark.parametrize("count", COUNTS)
def test_ffa_lora_is_exact(uploads, count):
    """Property 4, and A stays bit for bit."""
    state, updates = situation(uploads, "ffa-lora", count)
    strategy, new, broadcasts = step("ffa-lora", state, updates)
    assert measure(updates, broadcasts).rho < 1e-6
    assert strategy.exact
    for module in uploads.modules:
        assert torch.equal(new.adapter.factors[module].A, state.adapter.factors[module].A)
    assert "A" not in strategy.plan(1).trains | strategy.plan(1).sends


def test_ffa_lora_takes_no_a_from_clients(uploads):
    """A is never sent: whatever an upload has in its place must not reach the broadcast."""
    state = uploads.state()
    _, new, _ = step("ffa-lora", state, uploads.updates(3))
    for module in uploads.modules:
        assert torch.equal(new.adapter.factors[module].A, state.adapter.factors[module].A)


@pytest.mark.parametrize("count", [1, 5, 12])
def test_svd_does_not_depend_on_the_gauge(uploads, count):
    """Property 6: (B M, M⁻¹A) has the product of (B, A)."""
    state, updates = situation(uploads, "svd", count)
    turned = []
    for u, adapter in enumerate(updates.adapters):
        m = torch.randn(3, 3, generator=uploads.generator(u), dtype=torch.float64) + 2 * torch.eye(3)
        turned.append(
            Adapter(
                {k: Factors(f.B.double() @ m, torch.linalg.solve(m, f.A.double())) for k, f in adapter.factors.items()},
                adapter.head,
            )
        )
    other = Updates(updates.clients, tuple(turned), updates.weights)
    one, two = (step("svd", state, x)[2] for x in (updates, other))
    for module in uploads.modules:
        close(products(two, module)[0], products(one, module)[0])
        if count > 1:
            means = [products(step("fedit", state, x)[2], module)[0] for x in (updates, other)]
            assert np.linalg.norm(means[0] - means[1]) > 1, "means of factors do depend on it, so the above can fail"


class TestHeads:
    @pytest.mark.parametrize("name", SHARED)
    def test_averaged_with_the_weights(self, uploads, name):
        state, updates = situation(uploads, name, 5)
        _, new, broadcasts = step(name, state, updates)
        w = updates.weights.numpy()
        for key in state.adapter.head:
            wanted = sum(x * a.head[key].double().numpy() for x, a in zip(w, updates.adapters, strict=True))
            np.testing.assert_allclose(new.adapter.head[key].numpy(), wanted, rtol=1e-5, atol=1e-6)
            assert all(b.head[key] is new.adapter.head[key] for b in broadcasts)

    def test_local_keeps_them(self, uploads):
        state, updates = situation(uploads, "local", 3)
        strategy, new, broadcasts = step("local", state, updates)
        for own, broadcast in zip(updates.adapters, broadcasts, strict=True):
            same(broadcast, own)
        same(new.adapter, state.adapter)
        assert not strategy.plan(1).sends

    def test_local_remembers_clients_that_sit_a_round_out(self, uploads):
        state, first = situation(uploads, "local", 3)
        strategy, new, _ = step("local", state, first)
        later = Updates.collect([Update(1, 5, uploads.adapter(5)), Update(8, 5, uploads.adapter(6))])
        _, newer, _ = step("local", new, later)
        assert sorted(newer.personal) == [0, 1, 2, 8]
        same(strategy.broadcast(newer, 0), first.adapters[0])
        same(strategy.broadcast(newer, 1), later.adapters[0])
        assert sorted(new.personal) == [0, 1, 2]


class TestMistakesSeenInPublicCode:
    """ALGORITHMS §6: each assertion is one that the mistake breaks, on a case where it is visible."""

    @pytest.mark.parametrize("name", SHARED)
    def test_the_last_client_counts(self, uploads, name):
        """A typo kept only the first client's adapter in the mean."""
        state, updates = situation(uploads, name, 3)
        changed = list(updates.adapters)
        changed[2] = Adapter(
            {m: Factors(5 * f.B, f.A) for m, f in changed[2].factors.items()},
            {k: t + 1 for k, t in changed[2].head.items()},
        )
        moved = step(name, state, Updates(updates.clients, tuple(changed), updates.weights))[1].adapter
        before = step(name, state, updates)[1].adapter
        for module in uploads.modules:
            assert (moved.factors[module].product() - before.factors[module].product()).norm() > 0.1
        for key in before.head:
            torch.testing.assert_close(
                moved.head[key] - before.head[key], updates.weights[2].float().expand_as(before.head[key])
            )

    @pytest.mark.parametrize("name", SHARED)
    def test_weights_are_used_everywhere(self, dense, uploads, name):
        """Weighted and unweighted means mixed in one formula: nine shares for one client are nine equal clients."""
        state, _ = situation(uploads, name, 2)
        one, two = uploads.list(2, shared_a=state.adapter if name == "ffa-lora" else None)
        weighted = Updates.collect([Update(0, 90, one.adapter), Update(1, 10, two.adapter)])
        copies = Updates.collect([Update(u, 10, one.adapter) for u in range(9)] + [Update(9, 10, two.adapter)])
        a, b = (step(name, state, x)[2] for x in (weighted, copies))
        for module in uploads.modules:
            close(products(a, module)[0], products(b, module)[0])
            even = Updates.collect([Update(0, 1, one.adapter), Update(1, 1, two.adapter)])
            assert np.linalg.norm(products(a, module)[0] - products(step(name, state, even)[2], module)[0]) > 1

    def test_svd_has_the_root_on_both_sides(self, uploads):
        """A truncated SVD lost √Σ on one side: BᵀB and AAᵀ must both be the singular values."""
        state, updates = situation(uploads, "svd", 5)
        for module, pair in step("svd", state, updates)[1].adapter.factors.items():
            ideal = sum(w * f.product().double() for w, f in zip(updates.weights, updates.factors(module), strict=True))
            values = torch.diag(torch.linalg.svdvals(ideal)[:3]).float()
            torch.testing.assert_close(pair.B.T @ pair.B, values, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(pair.A @ pair.A.T, values, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("name", BUILTIN)
    def test_nothing_is_transposed(self, uploads, name):
        """Square modules hide a transpose from the shapes; the values must still be right way round."""
        d, r = 6, 2
        B, A = torch.zeros(d, r), torch.zeros(r, d)
        B[0, 0], B[1, 1], A[0, 4], A[1, 5] = 3.0, 2.0, 1.0, 1.0  # the product is 3 at (0, 4) and 2 at (1, 5)
        wanted = torch.zeros(d, d)
        wanted[0, 4], wanted[1, 5] = 3.0, 2.0
        adapter = Adapter({"square": Factors(B, A)})
        updates = Updates.collect([Update(0, 3, adapter), Update(1, 1, adapter)])
        state = ServerState(Adapter({"square": Factors(torch.zeros(d, r), A)}))
        for broadcast in step(name, state, updates)[2]:
            torch.testing.assert_close(broadcast.factors["square"].product(), wanted, rtol=1e-6, atol=1e-6)


class TestNothingLearned:
    """All B zero, as before the first step: the product stays zero, and it must still be possible to train."""

    @pytest.fixture
    def zero(self, uploads):
        state, updates = situation(uploads, "fedit", 4)
        still = tuple(
            Adapter({m: Factors(torch.zeros_like(f.B), f.A) for m, f in a.factors.items()}, a.head)
            for a in updates.adapters
        )
        return state, Updates(updates.clients, still, updates.weights)

    @pytest.mark.parametrize("name", BUILTIN)
    def test_stays_zero_and_finite(self, zero, name):
        _, _, broadcasts = step(name, *zero)
        divergence = measure(zero[1], broadcasts)
        assert divergence.rho == divergence.floor == 0
        for broadcast in broadcasts:
            for pair in broadcast.factors.values():
                assert not pair.B.any()
                assert torch.isfinite(pair.A).all()
                assert (pair.A.norm(dim=1) > 1e-3).all(), "a zero row of A beside a zero column of B never learns"

    def test_svd_keeps_unit_rows(self, zero):
        for pair in step("svd", *zero)[1].adapter.factors.values():
            torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(3), rtol=0, atol=1e-6)

    def test_svd_of_a_rank_deficient_mean(self, dense, uploads):
        """Rank one learned of three: the two idle directions have B = 0 and unit rows of A."""
        state, updates = situation(uploads, "svd", 4)
        first = updates.adapters[0].factors
        mask = torch.tensor([1.0, 0.0, 0.0])
        thin = tuple(
            Adapter({m: Factors((1 + u) * f.B * mask, f.A) for m, f in first.items()}, a.head)
            for u, a in enumerate(updates.adapters)
        )
        updates = Updates(updates.clients, thin, updates.weights)
        _, new, broadcasts = step("svd", state, updates)
        for module, pair in new.adapter.factors.items():
            ideal = dense.mean_product(dense.pairs(updates.factors(module)), updates.weights.numpy())
            close(products(broadcasts, module)[0], ideal, 1e-6)
            assert (pair.B.norm(dim=0) > 0).tolist() == [True, False, False]
            torch.testing.assert_close(pair.A[1:].norm(dim=1), torch.ones(2))
        assert measure(updates, broadcasts).floor < 1e-6
