"""The server's step around a strategy: heads, magnitudes, ranks, the order of the singular values, the base."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.adapter import Factors
from fedlora.adapter.base_update import BaseUpdate
from fedlora.adapter.updates import Update, Updates
from fedlora.strategies import registry
from fedlora.strategies.step import advance
from fedlora.testing import MIXED, begin, upload


class TestHeads:
    def test_averaged_with_the_weights_where_they_are_sent(self, rounds, entry):
        played = rounds.play(entry[0], 5, entry[1])
        w, before, after = played.updates.weights.numpy(), played.before.adapter.head, played.after.adapter.head
        for key in before:
            mean = sum(x * a.head[key].double().numpy() for x, a in zip(w, played.updates.adapters, strict=True))
            wanted = mean if entry[0] != "local" else before[key].numpy()
            np.testing.assert_allclose(after[key].numpy(), wanted, rtol=1e-5, atol=1e-6)
            assert after[key].dtype == torch.float32
            if entry[0] != "local":
                assert all(broadcast.head[key] is after[key] for broadcast in played.broadcasts)

    def test_magnitudes_too(self, rounds):
        """(3·1 + 1·5)/4 = 2."""
        state = rounds.state(rounds.make("fedit"))
        state = replace(state, adapter=replace(state.adapter, magnitudes={"narrow": torch.zeros(9)}))
        given = [
            Update(u, n, replace(state.adapter, magnitudes={"narrow": torch.full((9,), value)}))
            for u, n, value in ((0, 3, 1.0), (1, 1, 5.0))
        ]
        new = advance(registry.make("fedit"), state, Updates.collect(given))
        assert new.adapter.magnitudes["narrow"].tolist() == [2] * 9


class TestRanks:
    def test_a_lower_upload_lowers_the_rank_and_a_higher_one_does_not_raise_it(self, rounds):
        strategy = rounds.make("zero-padding")
        state = replace(rounds.state(strategy), ranks={1: 2, 7: 1})
        given = [Update(0, 1, state.adapter.cut(1)), Update(1, 1, state.adapter), Update(2, 1, state.adapter)]
        assert advance(strategy, state, Updates.collect(given)).ranks == {0: 1, 1: 2, 7: 1}

    def test_scaling_and_seed_stay(self, rounds, name):
        played = rounds.play(name, 3)
        assert (played.after.scaling, played.after.seed) == (played.before.scaling, played.before.seed)


class TestSvdOrder:
    @pytest.fixture(params=["zero-padding", "replication", "hetlora", "lora-fair", "flora-na", "oracle"])
    def pair_of_rounds(self, request, rounds):
        """A round as it is, and the same with its factors put in order."""
        strategy, state, given = rounds.situation(request.param, 5, True)
        plain = rounds.run(strategy, state, given)
        return plain, rounds.run(strategy, state, given, svd_order=True)

    def test_the_global_product_stays(self, rounds, pair_of_rounds):
        plain, ordered = (played.after.adapter.factors for played in pair_of_rounds)
        for module in rounds.modules:
            rounds.close(ordered[module].product().numpy(), plain[module].product().numpy())

    def test_the_first_indices_are_the_best_truncation(self, dense, rounds, pair_of_rounds):
        plain, ordered = (played.after.adapter.factors for played in pair_of_rounds)
        for module in rounds.modules:
            whole = plain[module].product().double().numpy()
            for rank in (1, 2):
                cut = ordered[module].at_rank(rank)
                wanted = dense.truncated(whole, rank)
                rounds.close(cut.product().double().numpy(), wanted)
                assert (
                    np.linalg.norm(wanted - whole)
                    <= np.linalg.norm(plain[module].at_rank(rank).product() - whole) + 1e-4
                )

    def test_everything_else_stays(self, pair_of_rounds):
        plain, ordered = (played.after for played in pair_of_rounds)
        assert ordered.diagnostics.keys() == plain.diagnostics.keys()
        assert ordered.ranks == plain.ranks
        assert ordered.base_step.tensors().keys() == plain.base_step.tensors().keys()
        torch.testing.assert_close(dict(ordered.adapter.head), dict(plain.adapter.head))

    def test_the_oracle_stays_exact(self, rounds):
        strategy, state, given = rounds.situation("oracle", 5, True)
        assert rounds.run(strategy, state, given, svd_order=True).measured().rho < 1e-6


class TestBase:
    @pytest.mark.parametrize("name", ["flora", "fedex-lora", "oracle"])
    def test_composes_over_rounds(self, rounds, name):
        """After three rounds the base holds the sum of three steps, in at most min(d_out, d_in) columns."""
        strategy, state, _ = rounds.situation(name)
        total = {module: np.zeros(shape) for module, shape in rounds.modules.items()}
        for number in range(3):
            state = advance(strategy, state, Updates.collect(rounds.uploaded(strategy, state, 4, seed=number)))
            for module in rounds.modules:
                total[module] += state.base_step.modules[module].product().double().numpy()
        for module, shape in rounds.modules.items():
            rounds.close(state.base.modules[module].product().double().numpy(), total[module])
            assert state.base.modules[module].rank <= min(shape)

    def test_a_step_is_of_one_round(self, rounds):
        """What was added in the last round does not count in a round that adds nothing."""
        strategy, state, given = rounds.situation("flora", 3)
        first = advance(strategy, state, Updates.collect(given))
        assert first.base_step
        second = advance(registry.make("fedit"), first, Updates.collect(given))
        assert not second.base_step
        assert second.base is first.base

    def test_the_residual_of_one_client_is_empty(self, rounds):
        played = rounds.play("fedex-lora", 1)
        assert played.after.base_step == BaseUpdate()

    def test_the_residual_is_as_narrow_as_the_centred_identity_says(self, rounds):
        """(U−1)·r columns, where that is below both sides."""
        step = rounds.play("fedex-lora", 3, modules={"m": (30, 20)}).after.base_step
        assert step.modules["m"].rank == 2 * 3


class TestIdleDirections:
    """A's row and B's column both zero would never be trained: A's row becomes the previous one, the product stays."""

    def test_by_hand(self, rounds):
        state = rounds.state(rounds.make("fedit"))
        idle = torch.tensor([0.0, 1.0, 0.0])
        new = {
            m: Factors(f.B * idle, f.A * torch.tensor([0.0, 1.0, 1.0])[:, None])
            for m, f in state.adapter.factors.items()
        }
        stored = state.with_factors(new).adapter.factors
        for module, pair in stored.items():
            before = state.adapter.factors[module]
            assert torch.equal(pair.A[0], before.A[0])
            assert torch.equal(pair.A[1:], new[module].A[1:])
            assert torch.equal(pair.B, new[module].B)
            assert torch.equal(pair.product(), new[module].product())

    def test_missing_directions_are_filled_up(self, rounds):
        state = rounds.state(rounds.make("fedit"))
        stored = state.with_factors({m: f.at_rank(1) for m, f in state.adapter.factors.items()}).adapter.factors
        for module, pair in stored.items():
            before = state.adapter.factors[module]
            assert torch.equal(pair.A, before.A)
            assert torch.equal(pair.B[:, :1], before.B[:, :1])
            assert not pair.B[:, 1:].any()

    def test_svd_of_a_rank_deficient_mean(self, dense, rounds):
        """Rank one learned of three: the two idle directions have B = 0 and unit rows of A."""
        strategy, state, given = rounds.situation("svd", 4)
        first = given[0].adapter.factors
        mask = torch.tensor([1.0, 0.0, 0.0])
        thin = [
            replace(
                u,
                adapter=u.adapter.with_factors(
                    {m: Factors((1 + u.client) * f.B * mask, f.A) for m, f in first.items()}
                ),
            )
            for u in given
        ]
        played = rounds.run(strategy, state, thin)
        for module, pair in played.after.adapter.factors.items():
            ideal = dense.mean_product(dense.pairs(played.sent.factors(module)), played.updates.weights.numpy())
            rounds.close(played.held(module)[0], played.before.scaling * ideal, 1e-6)
            assert (pair.B.norm(dim=0) > 0).tolist() == [True, False, False]
            torch.testing.assert_close(pair.A[1:].norm(dim=1), torch.ones(2))
        assert played.measured().floor < 1e-6


@pytest.mark.parametrize("name", ["flora", "florist", "fedsvd", "flexlora", "svd", "raflora"])
def test_svd_order_leaves_fresh_starts_and_what_is_in_order_as_they_are(name):
    strategy = registry.make(name)
    state = begin(strategy, MIXED)
    updates = upload(strategy, state, MIXED)
    plain, ordered = advance(strategy, state, updates), advance(strategy, state, updates, svd_order=True)
    for module, pair in plain.adapter.factors.items():
        assert torch.equal(pair.B, ordered.adapter.factors[module].B)
        assert torch.equal(pair.A, ordered.adapter.factors[module].A)
