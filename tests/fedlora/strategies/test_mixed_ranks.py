"""Clients of several ranks: what becomes of indices that few or none hold, and of clients without enough rank."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.updates import Update, Updates
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.replication import ownership
from fedlora.strategies.step import advance


@pytest.fixture
def case():
    """Global rank 3; client 0 (2 examples) at rank 1, client 1 (6 examples) at rank 2; nobody holds index 2."""
    before = Adapter({"m": Factors(torch.full((2, 3), 5.0), torch.full((3, 4), 7.0))})
    low = Adapter({"m": Factors(torch.tensor([[4.0], [0.0]]), torch.tensor([[8.0, 0, 0, 0]]))})
    high = Adapter(
        {"m": Factors(torch.tensor([[0.0, 1.0], [4.0, 2.0]]), torch.tensor([[0, 4.0, 0, 0], [0, 0, 3.0, 6]]))}
    )
    updates = Updates.collect([Update(0, 2, low), Update(1, 6, high)])
    return ServerState(before, ranks={0: 1, 1: 2}), updates


class TestByHand:
    """w = (1/4, 3/4)."""

    def test_zero_padding_dilutes(self, case):
        (pair,) = advance(registry.make("zero-padding"), *case).adapter.factors.values()
        # index 0: ¼·(4, 0) + ¾·(0, 4); index 1: ¾·(1, 2); index 2: nothing, so A's row is the one before
        assert pair.B.tolist() == [[1, 0.75, 0], [3, 1.5, 0]]
        assert pair.A.tolist() == [[2, 3, 0, 0], [0, 0, 2.25, 4.5], [7, 7, 7, 7]]

    def test_replication_does_not(self, case):
        (pair,) = advance(registry.make("replication"), *case).adapter.factors.values()
        # index 1 has one owner: its own values; index 2 has none: the value before stays, also of B
        assert pair.B.tolist() == [[1, 1, 5], [3, 2, 5]]
        assert pair.A.tolist() == [[2, 3, 0, 0], [0, 0, 3, 6], [7, 7, 7, 7]]

    def test_replication_without_the_only_owner_with_weight(self, case):
        """An owner whose weight is zero is none."""
        state, updates = case
        alone = replace(updates, weights=torch.tensor([1.0, 0.0], dtype=torch.float64))
        (pair,) = advance(registry.make("replication"), state, alone).adapter.factors.values()
        assert pair.B.tolist() == [[4, 5, 5], [0, 5, 5]]
        assert pair.A.tolist() == [[8, 0, 0, 0], [7, 7, 7, 7], [7, 7, 7, 7]]

    def test_owners(self):
        found = ownership([1, 3, 2], torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64), 4)
        assert found.tolist() == pytest.approx([1, 0.5, 0.2, 0])

    def test_what_clients_receive(self, case):
        """The first indices up to their rank; one that is not listed has the highest."""
        strategy = registry.make("replication")
        new = advance(strategy, *case)
        for client, rank in ((0, 1), (1, 2), (2, 3)):
            (pair,) = strategy.broadcast(new, client).factors.values()
            assert torch.equal(pair.B, new.adapter.factors["m"].B[:, :rank])
            assert torch.equal(pair.A, new.adapter.factors["m"].A[:rank])


def test_replication_is_filling_up_with_the_high_rank_mean(rounds):
    """arXiv 2406.17477: clients of rank 2 filled up with the mean of those of rank 3, then averaged."""
    strategy = rounds.make("replication")
    state = replace(rounds.state(strategy), ranks={0: 2, 2: 2})
    played = rounds.run(strategy, state, rounds.uploaded(strategy, state, 4))
    w = played.updates.weights
    for module in rounds.modules:
        given = list(played.sent.factors(module))
        high = [(w[u], given[u]) for u in (1, 3)]
        total = sum(x for x, _ in high)
        tail_b = sum(x * f.B[:, 2:].double() for x, f in high) / total
        tail_a = sum(x * f.A[2:].double() for x, f in high) / total
        filled = [
            f if f.rank == 3 else Factors(torch.cat([f.B, tail_b.float()], 1), torch.cat([f.A, tail_a.float()]))
            for f in given
        ]
        wanted_b = sum(x * f.B.double() for x, f in zip(w, filled, strict=True))
        wanted_a = sum(x * f.A.double() for x, f in zip(w, filled, strict=True))
        torch.testing.assert_close(played.after.adapter.factors[module].B.double(), wanted_b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(played.after.adapter.factors[module].A.double(), wanted_a, rtol=1e-5, atol=1e-5)


class TestOracle:
    def test_the_adapter_has_the_lowest_rank_and_the_base_the_rest(self, rounds):
        """So that every client holds all of W*; higher directions start from B = 0 and can be trained."""
        played = rounds.play("oracle", 5, True)
        for module, pair in played.after.adapter.factors.items():
            assert (pair.B.norm(dim=0) > 0).tolist() == [True, False, False]
            torch.testing.assert_close(pair.A[1:].norm(dim=1), torch.ones(2))
            for held in played.held(module):
                rounds.close(held, played.held(module)[0], 1e-6)

    def test_of_one_rank_it_is_the_optimum_of_that_rank(self, rounds):
        played = rounds.play("oracle", 5)
        best = rounds.run("svd", played.before, played.updates).after.adapter
        for module, pair in played.after.adapter.factors.items():
            torch.testing.assert_close(pair.product(), best.factors[module].product(), rtol=1e-5, atol=1e-5)

    def test_ranks_of_clients_that_were_absent_count_too(self, rounds):
        """Client 5 holds rank 1 but was not sampled: next round it must hold W* as well."""
        strategy = rounds.make("oracle")
        state = replace(rounds.state(strategy), ranks={5: 1})
        played = rounds.run(strategy, state, rounds.uploaded(strategy, state, 3))
        for pair in played.after.adapter.factors.values():
            assert not pair.B[:, 1:].any()


class TestFlora:
    def test_a_stack_of_any_ranks(self, rounds):
        """[B_1 … B_U]·[w_1A_1; …]: as wide as the ranks together, the scaling in it once."""
        strategy, state, given = rounds.situation("flora", 2, True, modules={"m": (30, 20)})
        played = rounds.run(strategy, state, given)
        step = played.after.base_step.modules["m"]
        assert step.rank == 2 + 3
        one, two = (update.adapter.factors["m"] for update in given)
        wanted = played.updates.weights.float()
        torch.testing.assert_close(
            step.product(), 4 * (wanted[0] * one.product() + wanted[1] * two.product()), rtol=1e-5, atol=1e-5
        )

    def test_a_fresh_start_by_seed_round_and_module(self, rounds):
        """Uniform within ±1/√d_in, as PEFT draws it; nothing of it depends on what clients sent."""
        modules = {"a": (12, 25), "b": (12, 25)}

        def fresh(seed=5, number=1, count=2):
            strategy, state, given = rounds.situation("flora", count, modules=modules, number=number)
            return rounds.run(strategy, replace(state, seed=seed), given).after.adapter.factors

        first = fresh()
        assert not any(pair.B.any() for pair in first.values())
        assert all(torch.equal(first[m].A, fresh(count=4)[m].A) for m in modules)
        others = [first["b"].A, fresh(seed=6)["a"].A, fresh(number=2)["a"].A]
        assert not any(torch.equal(first["a"].A, other) for other in others)
        for pair in first.values():
            assert 0.9 / 5 < float(pair.A.abs().max()) <= 1 / 5
            assert float(pair.A.mean().abs()) < 0.05

    def test_nothing_of_the_adapter_travels_down(self):
        assert not registry.make("flora").plan(2).down & {"A", "B"}


@pytest.mark.parametrize("number", [1, 2])
def test_rolora_says_who_trains_what(number):
    plan = registry.make("rolora").plan(number)
    now, before = ("B", "A") if number == 1 else ("A", "B")
    assert now in plan.trains & plan.up
    assert before not in plan.trains | plan.up
    assert before in plan.down, "what the round before has changed"
    assert now not in plan.down
