"""Strategies in which clients keep something for themselves: fedsa-lora and local."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.updates import Update, Updates
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.step import advance


@pytest.mark.parametrize("name", ["fedsa-lora", "local"])
def test_clients_that_sit_rounds_out_are_remembered(rounds, name):
    """Round one: clients 0–2. Round two: 1 and 8. Client 0 goes on with what it had after round one."""
    strategy, state, given = rounds.situation(name, 3)
    first = advance(strategy, state, Updates.collect(given))
    later = [Update(client, 5, rounds.train(strategy, first, client, seed=9)) for client in (1, 8)]
    second = advance(strategy, first, Updates.collect(later))
    assert sorted(second.personal) == [0, 1, 2, 8]
    assert sorted(first.personal) == [0, 1, 2]
    for client, adapter in ((0, given[0].adapter), (2, given[2].adapter), (1, later[0].adapter), (8, later[1].adapter)):
        for module, pair in strategy.broadcast(second, client).factors.items():
            assert torch.equal(pair.B, adapter.factors[module].B)
            shared = second.adapter.factors[module].A if name == "fedsa-lora" else adapter.factors[module].A
            assert torch.equal(pair.A, shared)


class TestFedSA:
    def test_a_newcomer_starts_without_anybodys_b(self, rounds):
        strategy, state, given = rounds.situation("fedsa-lora", 3, learned=0.0)
        new = advance(strategy, state, Updates.collect(given))
        for module, pair in strategy.broadcast(new, 77).factors.items():
            assert not pair.B.any()
            assert torch.equal(pair.A, new.adapter.factors[module].A)

    def test_b_does_not_travel(self):
        plan = registry.make("fedsa-lora").plan(3)
        assert plan.up == plan.down == {"A", "head"}
        assert "B" in plan.trains

    @pytest.mark.parametrize("own_head", [False, True])
    def test_the_head_is_the_clients_own_if_asked(self, rounds, own_head):
        strategy = registry.make("fedsa-lora", {"own_head": own_head})
        state = rounds.state(strategy)
        given = rounds.uploaded(strategy, state, 3)
        played = rounds.run(strategy, state, given)
        assert ("head" in strategy.plan(1).up) != own_head
        mean = played.updates.mean_head()
        for update, broadcast in zip(given, played.broadcasts, strict=True):
            for key, tensor in broadcast.head.items():
                torch.testing.assert_close(tensor, update.adapter.head[key] if own_head else mean[key].float())
        newcomer = strategy.broadcast(played.after, 77).head
        torch.testing.assert_close(
            dict(newcomer),
            dict(state.adapter.head) if own_head else {key: tensor.float() for key, tensor in mean.items()},
        )

    def test_doras_magnitudes_stay_with_b(self, rounds):
        """They scale the rows that B shapes."""
        strategy = registry.make("fedsa-lora")
        state = rounds.state(strategy)
        given = []
        for update in rounds.uploaded(strategy, state, 2):
            own = {"narrow": torch.full((9,), 1.0 + update.client)}
            given.append(Update(update.client, 1, replace(update.adapter, magnitudes=own)))
        state = replace(state, adapter=replace(state.adapter, magnitudes={"narrow": torch.ones(9)}))
        played = rounds.run(strategy, state, given)
        assert [b.magnitudes["narrow"][0].item() for b in played.broadcasts] == [1, 2]
        assert played.after.adapter.magnitudes["narrow"][0] == 1

    @pytest.mark.parametrize("own_head", [False, True])
    def test_nothing_is_kept_that_is_averaged(self, rounds, own_head):
        strategy = registry.make("fedsa-lora", {"own_head": own_head})
        state = rounds.state(strategy)
        played = rounds.run(strategy, state, rounds.uploaded(strategy, state, 2))
        for own, upload in zip(played.after.personal.values(), played.updates.adapters, strict=True):
            assert own.head.keys() == (upload.head.keys() if own_head else set())
            assert all(pair.A.numel() == 0 for pair in own.factors.values())

    def test_what_is_kept_is_a_copy(self, rounds):
        """An upload may live in a file that is soon gone, or in memory that is used again."""
        strategy, state, given = rounds.situation("fedsa-lora", 2)
        new = advance(strategy, state, Updates.collect(given))
        before = given[0].adapter.factors["narrow"].B.clone()
        given[0].adapter.factors["narrow"].B.zero_()
        assert torch.equal(new.personal[0].factors["narrow"].B, before)


class TestLocal:
    def test_everything_stays(self, rounds):
        for mixed in (False, True):
            played = rounds.play("local", 3, mixed)
            for own, broadcast in zip(played.updates.adapters, played.broadcasts, strict=True):
                rounds.same(broadcast, own)
            rounds.same(played.after.adapter, played.before.adapter)
        plan = played.strategy.plan(1)
        assert not plan.up | plan.down

    def test_a_client_is_all_that_enters_its_model(self, rounds):
        assert rounds.play("local", 4).measured().effective_clients == pytest.approx(1)


class TestCentralised:
    def test_the_only_client_is_the_global_model(self, rounds):
        played = rounds.play("centralised")
        (own,) = played.updates.adapters
        rounds.same(played.after.adapter, own)

    def test_doras_magnitudes_are_taken_over(self):
        pair = Factors(torch.ones(3, 1), torch.ones(1, 2))
        own = Adapter({"m": pair}, {}, {"m": torch.tensor([1.0, 2.0, 3.0])})
        start = Adapter({"m": pair}, {}, {"m": torch.ones(3)})
        strategy = registry.make("centralised")
        new = advance(strategy, ServerState(start), Updates.collect([Update(0, 5, own)]))
        assert new.adapter.magnitudes["m"].tolist() == [1, 2, 3]
