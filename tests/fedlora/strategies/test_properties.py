"""The properties of ALGORITHMS §5, for every strategy to which it applies (the eighth is test_against_dense.py)."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from rosters import CHANGE_THE_BASE, entries

from fedlora.adapter import Factors
from fedlora.adapter.updates import Update, Updates
from fedlora.strategies import registry

COUNTS = [1, 2, 5, 12]
EXACT = ["flora", "fedex-lora", "oracle", "ffa-lora", "rolora", "fedsvd", "fed-sb", "ravan"]
KEEPS_WHAT_NOBODY_SENT = {"raflora"}
"""Mixes the previous product of indices that no client held into those that were: by its definition, not by §5."""
NO_GAUGE = ["svd", "flexlora", "flora", "oracle", "fedex-lora"]


class TestOneOrIdenticalClients:
    """Property 1: the effective weight is the client's."""

    @pytest.mark.parametrize("count", [1, 4])
    def test_of_the_highest_rank(self, rounds, name, count):
        strategy, state, (one, *_) = rounds.situation(name, 1)
        copies = 1 if strategy.traits.pools_data else count
        played = rounds.run(strategy, state, [Update(u, 3 + 5 * u, one.adapter) for u in range(copies)])
        self.check(rounds, played)

    @pytest.mark.parametrize("entry", entries(mixed_but=KEEPS_WHAT_NOBODY_SENT))
    def test_of_a_lower_rank(self, rounds, entry):
        name, mixed = entry
        played = rounds.play(name, 1, mixed)
        assert played.updates.adapters[0].rank == (2 if mixed else 3)
        self.check(rounds, played)

    @staticmethod
    def check(rounds, played):
        for module in rounds.modules:
            for actual, own in zip(played.held(module), rounds.own(played, module), strict=True):
                rounds.close(actual, own, 1e-6)
        assert played.measured().rho < 1e-6


class TestOrder:
    """Property 2: the order of arrival matters not at all, the numbers that clients go by no more than rounding."""

    def test_of_arrival(self, rounds, entry):
        strategy, state, given = rounds.situation(entry[0], 5, entry[1])
        one, other = (rounds.run(strategy, state, updates) for updates in (given, given[::-1]))
        for client in (*range(5), 77):
            rounds.same(strategy.broadcast(one.after, client), strategy.broadcast(other.after, client))

    def test_of_the_clients_numbers(self, rounds, entry):
        strategy, state, given = rounds.situation(entry[0], 5, entry[1])
        renumbered = [Update(10 - u.client, u.examples, u.adapter) for u in given]
        moved = replace(state, ranks={10 - client: rank for client, rank in state.ranks.items()})
        one, other = rounds.run(strategy, state, given), rounds.run(strategy, moved, renumbered)
        for module in rounds.modules:
            for actual, mirrored in zip(one.held(module), reversed(other.held(module)), strict=True):
                rounds.close(actual, mirrored)
        torch.testing.assert_close(one.after.adapter.head, other.after.adapter.head)


@pytest.mark.parametrize("chosen", [0, 2])
@pytest.mark.parametrize("entry", entries(mixed_but=KEEPS_WHAT_NOBODY_SENT))
def test_a_client_with_all_the_weight_decides(rounds, entry, chosen):
    """Property 2: with weights (1, 0, …) it is that client's, also where the others have other ranks."""
    strategy, state, given = rounds.situation(entry[0], 3, entry[1])
    chosen = min(chosen, len(given) - 1)
    played = rounds.run(strategy, state, [Update(u.client, 50 * (u.client == chosen), u.adapter) for u in given])
    for module in rounds.modules:
        rounds.close(played.held(module)[chosen], rounds.own(played, module)[chosen], 1e-6)
    assert played.measured().rho < 1e-6


def each_module_and_all(divergences):
    """(divergence, divergence, …) of every module, and of the model."""
    yield divergences
    for module in divergences[0].modules:
        yield [divergence.modules[module] for divergence in divergences]


@pytest.mark.parametrize("drift", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("count", COUNTS)
def test_divergences_are_ordered(rounds, count, drift):
    """Property 3, with fp32 rounding for slack."""
    names = ("svd", "flora-na", "lora-fair", "fedit")
    measured = [rounds.play(name, count, seed=3, drift=drift).measured() for name in names]
    for svd, flora_na, lora_fair, fedit in each_module_and_all(measured):
        assert svd.rho == pytest.approx(svd.floor, abs=1e-6)
        assert max(svd.rho, 0) <= min(flora_na.rho, lora_fair.rho) + 1e-6
        assert max(flora_na.rho, lora_fair.rho) <= fedit.rho + 1e-6
        if count > 1:
            assert max(flora_na.rho, lora_fair.rho) < fedit.rho


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("entry", entries(but=CHANGE_THE_BASE))
def test_nobody_is_below_the_floor(rounds, entry, count):
    """Property 3, for every strategy that only broadcasts an adapter: SVD's is the smallest divergence."""
    name, mixed = entry
    played = rounds.play(name, count, mixed)
    before = replace(played.before, adapter=played.before.adapter.folded())
    optimum = rounds.run("svd", before, played.sent).measured()
    for found, best in each_module_and_all([played.measured(), optimum]):
        assert best.rho == pytest.approx(found.floor, abs=1e-6)
        assert found.rho >= best.rho - 1e-6


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", EXACT)
def test_exact_strategies_lose_nothing(dense, rounds, name, count):
    """Property 4: everybody of the highest rank holds W*, to 1e-6; those that change the base at every rank."""
    strategy = registry.find(name)
    assert strategy.traits.exact
    for mixed in (False, True) if not strategy.traits.one_rank else (False,):
        for number in (1, 2):
            played = rounds.play(name, count, mixed, number=number)
            for module in rounds.modules:
                pairs = dense.pairs(played.sent.factors(module))
                ideal = played.before.scaling * dense.mean_product(pairs, played.updates.weights.numpy())
                for actual, (_, A) in zip(played.held(module), pairs, strict=True):
                    if len(A) == rounds.rank or strategy.traits.changes_base:
                        rounds.close(actual, ideal, 1e-6)
            if strategy.traits.changes_base or not mixed:
                assert played.measured().rho < 1e-6


def test_exact_is_said_of_these_and_of_no_other(rounds):
    assert {name for name in rounds.expected if registry.find(name).traits.exact} == {*EXACT, "centralised"}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["zero-padding", "replication"])
def test_equal_ranks_leave_no_padding(rounds, name, count):
    """Property 5."""
    played = rounds.play(name, count)
    plain = rounds.run("fedit", played.before, played.updates).after.adapter
    for module in rounds.modules:
        torch.testing.assert_close(played.after.adapter.factors[module].B, plain.factors[module].B)
        torch.testing.assert_close(played.after.adapter.factors[module].A, plain.factors[module].A)


def turned(rounds, updates):
    """The same products in another gauge: (B M, M⁻¹ A)."""
    adapters = []
    for u, adapter in enumerate(updates.adapters):
        g, factors = rounds.uploads.generator(u), {}
        for module, pair in adapter.factors.items():
            M = torch.randn(pair.rank, pair.rank, generator=g, dtype=torch.float64) + 2 * torch.eye(pair.rank)
            factors[module] = Factors(pair.B.double() @ M, torch.linalg.solve(M, pair.A.double()))
        adapters.append(adapter.with_factors(factors))
    return Updates(updates.clients, tuple(adapters), updates.weights)


@pytest.mark.parametrize("count", [1, 5, 12])
@pytest.mark.parametrize("name", NO_GAUGE)
def test_the_gauge_does_not_matter(rounds, name, count):
    """Property 6."""
    for mixed in (False, True) if not registry.find(name).traits.one_rank else (False,):
        played = rounds.play(name, count, mixed)
        other = rounds.run(name, played.before, turned(rounds, played.updates))
        for module in rounds.modules:
            for actual, wanted in zip(other.held(module), played.held(module), strict=True):
                rounds.close(actual, wanted)


def test_the_gauge_does_matter_to_means_of_factors(rounds):
    """So that the test above can fail."""
    played = rounds.play("fedit", 5)
    other = rounds.run("fedit", played.before, turned(rounds, played.updates))
    for module in rounds.modules:
        assert np.linalg.norm(other.held(module)[0] - played.held(module)[0]) > 1


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("count", COUNTS)
def test_fedsvd_only_factors_the_product_anew(rounds, count, mixed):
    """Property 7: B̂Â = B̄A; A orthonormal, columns of B orthogonal and in the order of their size."""
    played = rounds.play("fedsvd", count, mixed)
    for module, pair in played.after.adapter.factors.items():
        before = played.before.adapter.factors[module].A.double()
        product = sum(
            w * torch.nn.functional.pad(f.B.double(), (0, rounds.rank - f.rank)) @ before
            for w, f in zip(played.updates.weights, played.sent.factors(module), strict=True)
        )
        rounds.close(pair.B.double().numpy() @ pair.A.double().numpy(), product.numpy(), 1e-6)
        torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(rounds.rank), rtol=0, atol=1e-6)
        sizes = pair.B.norm(dim=0)
        assert (sizes.diff() <= 0).all()
        torch.testing.assert_close(pair.B.T @ pair.B, sizes.square().diag(), rtol=1e-5, atol=1e-4)


def test_frozen_factors_stay_bit_for_bit(rounds):
    for number in (1, 2):
        for name, part in (("ffa-lora", "A"), ("rolora", "A" if number == 1 else "B")):
            played = rounds.play(name, 4, number=number)
            plan = played.strategy.plan(number)
            assert part not in plan.trains | plan.up
            for module, pair in played.before.adapter.factors.items():
                assert torch.equal(getattr(pair, part), getattr(played.after.adapter.factors[module], part))


class TestPure:
    def test_neither_argument_changes_and_nothing_is_remembered(self, rounds, entry):
        strategy, state, given = rounds.situation(entry[0], 5, entry[1])
        updates = Updates.collect(given)
        kept_state, kept = copy.deepcopy((state, updates))
        first = strategy.aggregate(state, updates)
        strategy.aggregate(first, updates)
        again, fresh = strategy.aggregate(state, updates), rounds.make(entry[0]).aggregate(kept_state, kept)
        rounds.same(state.adapter, kept_state.adapter)
        assert (state.personal, state.diagnostics, state.base.modules, state.round) == ({}, {}, {}, 0)
        assert torch.equal(updates.weights, kept.weights)
        for before, after in zip(kept.adapters, updates.adapters, strict=True):
            rounds.same(before, after)
        for other in (again, fresh):
            assert other.base_step.tensors().keys() == first.base_step.tensors().keys()
            for client in (*updates.clients, 77):
                rounds.same(strategy.broadcast(first, client), strategy.broadcast(other, client))

    def test_a_client_that_was_not_there_starts_from_the_global_adapter(self, rounds, entry):
        played = rounds.play(entry[0], 2, entry[1])
        for client in (90, 91, 92):
            rank = played.before.rank_of(client)
            rounds.same(played.strategy.broadcast(played.after, client), played.after.adapter.cut(rank))

    def test_says_what_it_is(self, name):
        strategy, plan = registry.make(name), registry.make(name).plan(1)
        assert strategy.name == name
        assert strategy.summary
        assert strategy.source
        assert strategy.traits.cost_up
        assert strategy.traits.cost_down
        assert strategy.traits.personal == (name in ("local", "fedsa-lora"))
        assert plan.up <= plan.trains


class TestNothingLearned:
    """All B zero, as before the first step: nothing comes of it, and every direction can still be trained."""

    def test_stays_nothing(self, rounds, entry):
        strategy, state, given = rounds.situation(entry[0], 4, entry[1], learned=0.0, drift=0.0)
        played = rounds.run(strategy, state, given)
        divergence = played.measured()
        assert divergence.rho == divergence.floor == 0
        for module in rounds.modules:
            for held in played.held(module):
                assert not held.any()
        for broadcast in played.broadcasts:
            for pair in broadcast.folded().factors.values():
                assert not pair.B.any()
                assert torch.isfinite(pair.A).all()
                assert (pair.A.norm(dim=1) > 1e-3).all(), "a zero row of A beside a zero column of B never learns"

    def test_a_rank_nobody_has_stays_trainable(self, rounds, entry):
        """Only clients of rank 1 took part: the directions beyond have B or A that is not zero."""
        strategy, state, _ = rounds.situation(entry[0], mixed=entry[1])
        state = replace(state, ranks=dict.fromkeys(range(3), 1) if entry[1] else {})
        played = rounds.run(strategy, state, rounds.uploaded(strategy, state, 3))
        for pair in played.after.adapter.factors.values():
            assert pair.rank == rounds.rank
            assert ((pair.A.norm(dim=1) > 1e-3) | (pair.B.norm(dim=0) > 1e-3)).all()
        for module in rounds.modules:
            for held in played.held(module):
                assert np.isfinite(held).all()
