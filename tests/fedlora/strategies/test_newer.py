"""raflora, fedrot-lora, fedmomentum, florist, fed-sb and ravan beyond the tables: what only they do."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.adapter.leading import directions_for
from fedlora.strategies import registry
from fedlora.strategies.fedit import FedIT
from fedlora.strategies.step import advance, measure_round
from fedlora.testing import EQUAL, begin, upload


class TestRotation:
    """fedrot-lora."""

    @staticmethod
    def turned(own, reference, by_a, strength):
        """arXiv 2602.23638 on dense arrays: Procrustes with determinant +1, blended, made orthogonal again."""
        B, A = own
        overlap = A @ reference[1].T if by_a else B.T @ reference[0]
        u, _, vh = np.linalg.svd(overlap)
        u[:, -1] *= np.linalg.det(u @ vh)
        blend = (1 - strength) * np.eye(len(A)) + strength * u @ vh
        left, _, right = np.linalg.svd(blend)
        return B @ left @ right, (left @ right).T @ A

    @pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("number", [2, 3])
    def test_against_dense(self, dense, rounds, number, strength):
        strategy = rounds.make("fedrot-lora", strength=strength)
        state = rounds.state(strategy, number=number)
        played = rounds.run(strategy, state, rounds.uploaded(strategy, state, 5))
        for module in rounds.modules:
            (reference,) = dense.pairs([state.adapter.factors[module]])
            pairs = [
                self.turned(own, reference, number == 2, strength)
                for own in dense.pairs(played.updates.factors(module))
            ]
            for (B, A), (own_b, own_a) in zip(pairs, dense.pairs(played.updates.factors(module)), strict=True):
                np.testing.assert_allclose(B @ A, own_b @ own_a, atol=1e-9)
            wanted = state.scaling * dense.product_of_means(pairs, played.updates.weights.numpy())
            rounds.close(played.held(module)[0], wanted)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["florist", "fedmomentum"])
def test_what_is_dropped_is_a_share_of_the_energy(rounds, name, energy):
    """ρ² ≤ 1 − τ, and one direction fewer would not have been enough."""
    strategy = rounds.make(name, energy=energy)
    state = rounds.state(strategy)
    played = rounds.run(strategy, state, rounds.uploaded(strategy, state, 5))
    for module, found in played.measured().modules.items():
        assert found.rho**2 <= 1 - energy + 1e-9
        step = played.after.base_step.modules.get(module)
        kept = (0 if step is None else step.rank) + (rounds.rank if name == "fedmomentum" else 0)
        ideal = sum(
            w * f.product().double() for w, f in zip(played.updates.weights, played.sent.factors(module), strict=True)
        )
        energies = torch.linalg.svdvals(ideal).square()
        if kept > rounds.rank and kept < min(rounds.modules[module]):
            assert energies[: kept - 1].sum() < energy * energies.sum()


@pytest.mark.parametrize(
    ("values", "share", "count"),
    [([3.0, 4.0][::-1], 0.64, 1), ([4.0, 3.0], 0.65, 2), ([4.0, 3.0, 0.0], 1, 2), ([0.0, 0.0], 0.9, 0), ([], 0.5, 0)],
)
def test_directions_by_hand(values, share, count):
    """4² is 16 of 25 = 0.64."""
    assert directions_for(torch.tensor(values), share) == count


class TestCores:
    @pytest.mark.parametrize(("name", "options"), [("fed-sb", {}), ("fed-sb", {"start": "random"}), ("ravan", {})])
    def test_only_the_core_moves(self, rounds, name, options):
        strategy = rounds.make(name, **options)
        state = rounds.state(strategy)
        played = rounds.run(strategy, state, rounds.uploaded(strategy, state, 4))
        for module, pair in played.after.adapter.factors.items():
            assert torch.equal(pair.A, state.adapter.factors[module].A)
            assert torch.equal(pair.B, state.adapter.factors[module].B)
            eye = torch.eye(rounds.rank)
            torch.testing.assert_close(pair.A @ pair.A.T, eye, rtol=0, atol=1e-5)
            torch.testing.assert_close(pair.B.T @ pair.B, eye, rtol=0, atol=1e-5)
            mean = sum(
                w * a.cores[module] for w, a in zip(played.updates.weights, played.updates.adapters, strict=True)
            )
            torch.testing.assert_close(played.after.adapter.cores[module], mean.float())
            assert not state.adapter.cores[module].any()
        assert registry.make(name).plan(1).up == {"core", "head"}

    @pytest.mark.parametrize("name", ["fed-sb", "ravan"])
    @pytest.mark.parametrize("variant", ["dora", "hira"])
    def test_refused_where_there_is_no_place_for_it(self, name, variant):
        assert "trains a matrix between A and B" in registry.find(name).refusal(variant, False, False).reason
        assert "one rank" in registry.find(name).refusal("lora", True, False).reason

    def test_ravan_divides_its_rank(self):
        assert registry.make("ravan").refuses_rank(8) is None
        assert "heads=4" in registry.make("ravan").refuses_rank(6)


@pytest.mark.parametrize("name", ["fed-sb", "ravan"])
def test_a_core_sent_to_all_is_measured_as_one_broadcast(name):
    strategy = registry.make(name)
    state = begin(strategy, EQUAL)
    updates = upload(strategy, state, EQUAL)
    found = measure_round(strategy, advance(strategy, state, updates), updates)
    assert all(module.by_client == {} for module in found.modules.values())
    assert found.rho < 1e-6


class TestOwnBroadcast:
    """A plug-in that says what it sends; it sends what it would have sent anyhow."""

    class Plain(FedIT):
        def broadcast(self, state, client):
            return state.adapter.cut(state.rank_of(client))

    class Common(Plain):
        traits = replace(FedIT.traits, common_broadcast=True)

    class Older(Plain):
        common_broadcast = True

    def measured(self, strategy):
        state = begin(strategy, EQUAL)
        updates = upload(strategy, state, EQUAL)
        return measure_round(strategy, advance(strategy, state, updates), updates)

    def test_is_measured_by_client(self):
        found, of_all = self.measured(self.Plain()), self.measured(FedIT())
        assert all(sorted(module.by_client) == [0, 1, 2, 3, 4] for module in found.modules.values())
        assert (found.rho, found.R) == pytest.approx((of_all.rho, of_all.R), rel=1e-9)

    @pytest.mark.parametrize("kind", [Common, Older])
    def test_is_measured_once_where_it_says_that_it_is_for_all(self, kind):
        assert self.measured(kind()) == self.measured(FedIT())
