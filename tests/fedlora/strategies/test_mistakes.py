"""The mistakes of ALGORITHMS §6, seen in public code: each test breaks when that mistake is made here."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rosters import ALONE, TRAIN_A_CORE, entries, names

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.updates import Update, Updates
from fedlora.config.lora import LoraConfig
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState

CHANGES_BASE = ["flora", "fedex-lora", "oracle"]


def moved(updates: Updates, position: int) -> Updates:
    """One client's upload made another one."""
    changed = list(updates.adapters)
    own = changed[position]
    factors = {m: Factors(5 * f.B + 1, f.A) for m, f in own.factors.items()}
    cores = {m: 5 * core + 1 for m, core in own.cores.items()}
    changed[position] = Adapter(factors, {k: t + 1 for k, t in own.head.items()}, cores=cores)
    return replace(updates, adapters=tuple(changed))


class TestTransposed:
    """A residual added transposed to a linear layer: hidden where q and v are square."""

    @pytest.mark.parametrize("name", names(but=TRAIN_A_CORE))
    def test_the_update_that_clients_hold(self, rounds, name):
        """Two different clients on a square module, by hand: W*/s has 3/4·3 at (0, 4), 1/4·8 at (1, 5)."""
        d, r = 6, 2
        state = rounds.state(rounds.make(name), scaling=3.0, learned=0.0, modules={"square": (d, d)}, rank=r)
        A = torch.zeros(r, d)
        A[0, 4] = A[1, 5] = 1.0
        state = replace(state, adapter=Adapter({"square": Factors(torch.zeros(d, r), A)}, state.adapter.head))
        given, wanted = [], np.zeros((d, d))
        for client, (examples, at, value) in enumerate([(3, (0, 0), 3.0), (1, (1, 1), 8.0)]):
            B = torch.zeros(d, r)
            B[at] = value
            given.append(Update(client, examples, Adapter({"square": Factors(B, A)}, state.adapter.head)))
        wanted[0, 4], wanted[1, 5] = 3.0 * 3 / 4 * 3.0, 3.0 * 1 / 4 * 8.0
        if name in ALONE or name == "fedsa-lora":  # what a client holds is its own
            wanted[1, 5] = 0.0
            wanted[0, 4] = 3.0 * 3.0
        if name == "hetlora":  # its weights are 3 and 8 of 11
            wanted[0, 4], wanted[1, 5] = 3.0 * 3 / 11 * 3.0, 3.0 * 8 / 11 * 8.0
        played = rounds.run(name, state, given[:1] if name == "centralised" else given)
        rounds.close(played.held("square")[0], wanted, 1e-6)

    @pytest.mark.parametrize("name", CHANGES_BASE)
    def test_the_residual_of_square_modules(self, dense, rounds, name):
        """The base update alone: it and its transpose are as far apart as they are large."""
        modules = {"query": (16, 16), "value": (7, 7)}
        played = rounds.play(name, 4, modules=modules)
        for module in modules:
            pairs, w = dense.pairs(played.sent.factors(module)), played.updates.weights.numpy()
            kept = played.after.adapter.factors[module].product().double().numpy()
            wanted = played.before.scaling * (dense.mean_product(pairs, w) - kept)
            step = played.after.base_step.modules[module].product().double().numpy()
            rounds.close(step, wanted)
            assert np.linalg.norm(step.T - wanted) > np.linalg.norm(wanted)


class TestOnlyTheFirstClient:
    """A typo kept only the first client's adapter in the mean."""

    @pytest.mark.parametrize("position", [0, 1, 2])
    @pytest.mark.parametrize("entry", entries(but=ALONE))
    def test_everybody_counts(self, rounds, entry, position):
        name, mixed = entry
        strategy, state, given = rounds.situation(name, 3, mixed)
        updates = Updates.collect(given)
        before, after = (rounds.run(strategy, state, each) for each in (updates, moved(updates, position)))
        other = (position + 1) % 3
        for module in rounds.modules:
            difference = after.held(module)[other] - before.held(module)[other]
            if name == "fedsa-lora":
                continue
            assert np.linalg.norm(difference) > 0.1
        for key, tensor in before.after.adapter.head.items():
            share = updates.weights[position].float().expand_as(tensor)
            torch.testing.assert_close(after.after.adapter.head[key] - tensor, share, rtol=1e-4, atol=1e-6)

    def test_every_a_counts_in_fedsa_lora(self, rounds):
        strategy, state, given = rounds.situation("fedsa-lora", 3)
        w = Updates.collect(given).weights
        played = rounds.run(strategy, state, given)
        for module in rounds.modules:
            mean = sum(x * u.adapter.factors[module].A.double() for x, u in zip(w, given, strict=True))
            for broadcast in played.broadcasts:
                torch.testing.assert_close(broadcast.factors[module].A, mean.float())


class TestScalingAndWeights:
    """α/r missing from residuals; weighted and unweighted means mixed in one formula."""

    @pytest.mark.parametrize("name", CHANGES_BASE)
    def test_the_residual_carries_the_scaling_once(self, rounds, name):
        one, four = (rounds.play(name, 4, scaling=scaling) for scaling in (1.0, 4.0))
        for module in rounds.modules:
            small, large = (played.after.base_step.modules[module].product().double() for played in (one, four))
            rounds.close(large.numpy(), 4 * small.numpy())
            pair, other = (played.after.adapter.factors[module] for played in (one, four))
            assert torch.equal(pair.B, other.B)
            assert torch.equal(pair.A, other.A)

    @pytest.mark.parametrize("name", names(but={*ALONE, "hetlora"}))  # which replaces the shares, see test_hetlora.py
    def test_nine_shares_are_nine_clients(self, rounds, name):
        """Weights 9 : 1 are ten clients with one share each, nine of them the same; 1 : 1 is something else."""
        strategy, state, given = rounds.situation(name, 2)
        one, two = (update.adapter for update in given)
        weighted = rounds.run(strategy, state, [Update(0, 90, one), Update(1, 10, two)])
        copies = rounds.run(strategy, state, [*(Update(u, 10, one) for u in range(9)), Update(9, 10, two)])
        even = rounds.run(strategy, state, [Update(0, 1, one), Update(1, 1, two)])
        for module in rounds.modules:
            rounds.close(weighted.held(module)[0], copies.held(module)[0])
            assert np.linalg.norm(weighted.held(module)[0] - even.held(module)[0]) > 1

    def test_uniform_weights_ignore_the_examples(self, rounds, name):
        strategy, state, given = rounds.situation(name, 4)
        other = [Update(u.client, 1 + 9 * u.client, u.adapter) for u in given]
        one, two = (rounds.run(strategy, state, each, "uniform") for each in (given, other))
        rounds.same(one.after.adapter, two.after.adapter)


class TestTheRootOfTheSingularValues:
    """A truncated SVD lost √Σ on one side."""

    @pytest.mark.parametrize("mixed", [False, True])
    def test_svd_has_it_on_both(self, dense, rounds, mixed):
        played = rounds.play("svd", 5, mixed)
        for module, pair in played.after.adapter.factors.items():
            ideal = dense.mean_product(dense.pairs(played.sent.factors(module)), played.updates.weights.numpy())
            values = torch.from_numpy(np.diag(np.linalg.svd(ideal, compute_uv=False)[: rounds.rank])).float()
            torch.testing.assert_close(pair.B.T @ pair.B, values, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(pair.A @ pair.A.T, values, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("name", ["flexlora", "fedsvd"])
    def test_elsewhere_all_of_it_is_on_b(self, dense, rounds, name):
        """Both are exact up to their rank here, so that the values are those of W*/s."""
        played = rounds.play(name, 5)
        for module, pair in played.after.adapter.factors.items():
            ideal = dense.mean_product(dense.pairs(played.sent.factors(module)), played.updates.weights.numpy())
            values = torch.from_numpy(np.linalg.svd(ideal, compute_uv=False)[: rounds.rank]).float()
            torch.testing.assert_close(pair.A @ pair.A.T, torch.eye(rounds.rank), rtol=0, atol=1e-5)
            torch.testing.assert_close(pair.B.norm(dim=0), values, rtol=1e-5, atol=1e-4)


class TestPaddingKeepsTheScaling:
    """Padding ranks without keeping α/r equal."""

    @pytest.mark.parametrize(("variant", "scaling"), [("lora", 16 / 8), ("rslora", 16 / 8**0.5)])
    def test_every_rank_has_the_scaling_of_the_configuration(self, variant, scaling):
        lora = LoraConfig(variant=variant, rank=8, alpha=16, ranks=[2, 32, 8])
        assert lora.scaling == pytest.approx(scaling)
        for rank in (2, 8, 32):
            divisor = rank if variant == "lora" else rank**0.5
            assert lora.alpha_at(rank) / divisor == pytest.approx(scaling)

    @pytest.mark.parametrize("count", [1, 4])
    @pytest.mark.parametrize(
        "name", ["svd", "flexlora", "flora", "oracle", "zero-padding", "hetlora", "lora-fair", "flora-na"]
    )
    def test_a_padded_upload_is_the_upload(self, rounds, name, count):
        """A client of rank 1 that sends its factors padded with zeros must change nothing for products."""
        strategy, state, given = rounds.situation(name, count, True)
        updates = Updates.collect(given)
        padded = replace(
            updates,
            adapters=tuple(
                a.with_factors({m: f.at_rank(rounds.rank) for m, f in a.factors.items()}) for a in updates.adapters
            ),
        )
        one, other = rounds.run(strategy, state, updates), rounds.run(strategy, state, padded)
        for module in rounds.modules:
            for actual, wanted in zip(other.held(module), one.held(module), strict=True):
                rounds.close(actual, wanted, 1e-6)


class TestPersonalStaysPersonal:
    """ "Personal" strategies that in fact overwrite every client's B."""

    @pytest.mark.parametrize("name", ["fedsa-lora", "local"])
    def test_every_client_goes_on_with_its_own_b(self, rounds, name):
        played = rounds.play(name, 4)
        for own, broadcast in zip(played.updates.adapters, played.broadcasts, strict=True):
            for module in rounds.modules:
                assert torch.equal(broadcast.factors[module].B, own.factors[module].B)
        bs = [broadcast.factors["narrow"].B for broadcast in played.broadcasts]
        assert not any(torch.equal(bs[0], other) for other in bs[1:])

    def test_every_strategy_that_says_so_broadcasts_by_client(self, rounds, name):
        first, *others = (b.factors["narrow"].B for b in rounds.play(name, 4).broadcasts)
        different = not all(torch.equal(first, other) for other in others)
        assert different == registry.find(name).traits.personal != registry.make(name).broadcasts_to_all


def test_a_state_with_no_base_update_holds_just_its_product(rounds):
    """So that the tests above see what clients hold: nothing is hidden in the base of other strategies."""
    assert not ServerState(rounds.uploads.adapter(0)).base_step
    for name in rounds.expected:
        assert bool(rounds.play(name, 3).after.base_step) == registry.find(name).traits.changes_base
