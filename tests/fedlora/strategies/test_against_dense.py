"""Every strategy against the dense oracle of conftest.py (property 8 of ALGORITHMS §5), and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rosters import TRAIN_A_CORE, entries

from fedlora.strategies import registry

SCALING = {"lora": 12 / 3, "rslora": 12 / 3**0.5}


def shares(uploads, count, weighting):
    """The clients' weights, by hand."""
    counts = np.array(uploads.example_counts(count), dtype=float)
    return counts / counts.sum() if weighting == "examples" else np.full(count, 1 / count)


def test_every_strategy_has_an_oracle(rounds):
    """Here, or in a test file of its own."""
    own = {path.stem.removeprefix("test_").replace("_", "-") for path in Path(__file__).parent.glob("test_*.py")}
    assert set(rounds.expected) <= set(rounds.names) <= set(rounds.expected) | own


@pytest.mark.parametrize("variant", SCALING)
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_what_each_client_holds(rounds, uploads, table, count, weighting, variant):
    """s·B̂Â and base update together, to 1e-5; the joint rank is below min(d_out, d_in) of some modules and not of
    others, and every round of two is played, for strategies that alternate."""
    name, mixed = table
    for number in (1, 2) if name == "rolora" else (1,):
        strategy, state, given = rounds.situation(name, count, mixed, scaling=SCALING[variant], number=number)
        played = rounds.run(strategy, state, given, weighting)
        w = shares(uploads, len(given), weighting)
        for module, shape in rounds.modules.items():
            wanted = rounds.wanted(played, module, w)
            for actual, want in zip(played.held(module), wanted, strict=True):
                assert actual.shape == shape
                rounds.close(actual, want)


@pytest.mark.parametrize("count", [1, 5, 12])
def test_divergence_as_measured(dense, rounds, entry, count):
    """ρ of what clients hold, weighted over them; the floor of what their ranks allow; effective weights from p."""
    name, mixed = entry
    played = rounds.play(name, count, mixed)
    w, measured = played.updates.weights.numpy(), played.measured()
    for module in rounds.modules:
        s, found = played.before.scaling, measured.modules[module]
        ideal = s * dense.mean_product(dense.pairs(played.sent.factors(module)), w)
        assert found.rho == pytest.approx(dense.rho(played.held(module), ideal, w), abs=1e-7)
        floors = [dense.floor(ideal, broadcast.factors[module].rank) ** 2 for broadcast in played.broadcasts]
        assert found.floor == pytest.approx(np.sqrt(w @ floors), abs=1e-7)


@pytest.mark.parametrize("count", [1, 5])
def test_broadcasts_are_what_clients_can_load(rounds, entry, count):
    """fp32, with the modules and shapes that each client had, at its own rank; the round is counted."""
    name, mixed = entry
    played = rounds.play(name, count, mixed, number=4)
    assert played.after.round == 4
    for client, broadcast in zip(played.updates.clients, played.broadcasts, strict=True):
        broadcast.check_like(played.strategy.broadcast(played.before, client), name)
        assert {tensor.dtype for tensor in broadcast.tensors().values()} == {torch.float32}
        assert broadcast.rank == played.before.rank_of(client)
    assert played.after.adapter.rank == played.before.adapter.rank


@pytest.mark.parametrize("table", entries(but=TRAIN_A_CORE))  # cores are made for the ranks of all modules
def test_modules_of_several_ranks(rounds, table):
    """PEFT's rank_pattern: one module has a lower rank than the others, also for clients of the highest."""
    name, mixed = table
    strategy, state, _ = rounds.situation(name, mixed=mixed)
    thin = {**state.adapter.factors, "narrow": state.adapter.factors["narrow"].at_rank(2)}
    state = replace(state, adapter=state.adapter.with_factors(thin))
    played = rounds.run(strategy, state, rounds.uploaded(strategy, state, 5))
    for module in rounds.modules:
        wanted = rounds.wanted(played, module, played.updates.weights.numpy())
        for actual, want in zip(played.held(module), wanted, strict=True):
            rounds.close(actual, want)
    assert [played.after.rank(module) for module in sorted(rounds.modules)] == [3, 3, 2]


ONE_RANK = {
    "fedit": "factors of different ranks have no mean; zero-padding, replication and flexlora say how to form one",
    "fedsa-lora": "the paper averages A of one rank; with clients of several ranks use replication or flexlora",
    "fedex-lora": "the residual is one for all, but clients of lower rank would hold another adapter; use flora or",
    "centralised": "there is one client",
}
CHANGES_BASE = {"flora", "fedex-lora", "oracle"}
EXACT = {"ffa-lora", "rolora", "fedsvd"}
TURNED = {"ffa-lora", "fedsa-lora", "rolora", "local"}


@pytest.mark.parametrize(
    "name", sorted(ONE_RANK.keys() | CHANGES_BASE | EXACT | TURNED | {"svd", "flora-na", "hetlora"})
)
class TestRefusals:
    def test_clients_of_several_ranks(self, name):
        refused = registry.find(name).refusal("lora", True, False)
        assert bool(refused) == (name in ONE_RANK)
        if refused:
            assert refused.setting == "ranks"
            assert f"it needs clients of one rank: {ONE_RANK[name]}" in refused.reason
            with pytest.raises(ValueError, match=f"strategy={name} does not go with lora.ranks: it needs clients of"):
                registry.check_combination(name, "lora", True, False)

    @pytest.mark.parametrize(("variant", "part"), [("dora", "DoRA's norm"), ("hira", "HiRA's gate")])
    def test_variants_that_depend_on_the_base(self, name, variant, part):
        refused = registry.find(name).refusal(variant, False, False)
        if name in CHANGES_BASE:
            assert f"changes the base, and {part} depends on the base" in refused.reason
        elif name in EXACT and variant == "dora":
            assert "exact only for products B·A, and DoRA's norm is not linear" in refused.reason
        else:
            assert refused is None

    def test_svd_ordered_truncation(self, name):
        refused = registry.find(name).refusal("lora", False, True)
        assert bool(refused) == (name in TURNED)
        if refused:
            with pytest.raises(
                ValueError, match=f"strategy={name} does not go with lora.truncation=svd: .*cannot turn"
            ):
                registry.check_combination(name, "lora", False, True)

    @pytest.mark.parametrize("variant", ["lora", "rslora"])
    def test_plain_lora_of_one_rank_goes_with_everything(self, name, variant):
        assert registry.find(name).refusal(variant, False, False) is None
        registry.check_combination(name, variant, False, False)
