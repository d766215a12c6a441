"""Clients of different ranks: how they are given, what is refused, and what comes of them in a run."""

import json

import numpy as np
import pytest
import torch
import yaml

from fedlora.adapter.weights import EVERY_PART, Adapter, wire_size
from fedlora.config import RunConfig, configfile
from fedlora.config.lora import LoraConfig, RankRule
from fedlora.data import tokens
from fedlora.data.partition import Partition
from fedlora.errors import ConfigError
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import OBJECTIVE, Confusion
from fedlora.run import ranks, rounds
from fedlora.run.runfolder import RunFolder
from fedlora.training import client

RULE = RankRule(low=2, high=4, share=0.3)
MIXED = {"strategy": "zero-padding", "lora.ranks": [2, 4, 7]}
FOUR = {"clients": 4, "strategy": "replication"}


# -- how they are given


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("lora.ranks=[2,4,4,8]", [2, 4, 4, 8]),
        ("lora.ranks=2,4,4,8", [2, 4, 4, 8]),
        ("lora.ranks=2, 4, 4, 8,", [2, 4, 4, 8]),
        ("lora.ranks={4: 0.5, 8: 0.5}", {4: 0.5, 8: 0.5}),
        ("lora.ranks={4: 1}", {4: 1.0}),
        ("lora.ranks={low: 2, high: 4, share: 0.3}", RULE),
        ("lora.ranks={high: 30}", RankRule(low=5, high=30, share=0.1)),
        ("lora.ranks=null", None),
        ("lora.ranks=", None),
    ],
)
def test_every_form_on_the_command_line_in_yaml_and_back(word, value, tmp_path):
    config = configfile.build({**FOUR, **configfile.parse_overrides([word])})
    assert config.lora.ranks == value
    (tmp_path / "run.yaml").write_text(f"clients: 4\nstrategy: replication\nlora:\n  ranks: {word.partition('=')[2]}\n")
    assert configfile.load(tmp_path / "run.yaml") == config
    (tmp_path / "written.yaml").write_text(configfile.to_yaml(config))
    for again in (
        configfile.load(tmp_path / "written.yaml"),
        RunConfig.model_validate(json.loads(config.model_dump_json())),
        RunConfig.model_validate(yaml.safe_load(configfile.to_yaml(config))),
    ):
        assert again == config
        assert again.digest() == config.digest()


def test_another_value_replaces_the_whole_of_a_presets(tmp_path):
    (tmp_path / "run.yaml").write_text("clients: 4\nstrategy: svd\nlora: {ranks: {low: 2, high: 4}}\n")
    for word in ("lora.ranks={4: 0.5, 8: 0.5}", "lora.ranks=2,4,4,8", "lora.ranks=null"):
        override = configfile.parse_overrides([word])
        plain = configfile.build({"clients": 4, "strategy": "svd", **override})
        assert configfile.load(tmp_path / "run.yaml", override) == plain


def test_the_digest_knows_the_ranks_and_not_how_they_are_written():
    def digest(value):
        return configfile.build({**FOUR, "lora.ranks": value}).digest()

    assert digest({8: 0.5, 4: 0.5}) == digest({4: 0.5, 8: 0.5}) == digest({"4": 0.5, "8": "0.5"})
    assert digest({"low": 5}) == digest({"low": 5, "high": 20, "share": 0.1})
    values = ([2, 4, 4, 8], [4, 2, 4, 8], {4: 0.5, 8: 0.5}, {4: 0.4, 8: 0.6}, {"low": 2}, {"low": 3}, None)
    assert len({digest(value) for value in values}) == len(values)


FORMS = r"expected a list with one whole number per client \(\[2, 4, 8\]\), shares .* or a rule \(\{low: 5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", rf"lora\.ranks=4 is not allowed: {FORMS}"),
        ("true", rf"lora\.ranks=True is not allowed: {FORMS}"),
        ("abc", rf"lora\.ranks='abc' is not allowed: {FORMS}"),
        ("2,4,x,8", rf"lora\.ranks='2,4,x,8' is not allowed: {FORMS}"),
        ("[2, 4.5, 4, 8]", rf"lora\.ranks=\[2, 4\.5, 4, 8\] is not allowed: {FORMS}"),
        ("{four: 1}", rf"lora\.ranks=\{{'four': 1\}} is not allowed: {FORMS}"),
        ("{4: half, 8: 0.5}", rf"lora\.ranks=\{{4: 'half', 8: 0\.5\}} is not allowed: {FORMS}"),
        ("{4: .nan, 8: 0.5}", rf"lora\.ranks=\{{4: nan, 8: 0\.5\}} is not allowed: {FORMS}"),
        ("[0, 1, 1, 1]", r"lora\.ranks=\[0, 1, 1, 1\] is not allowed: ranks are whole numbers from 1"),
        ("[]", r"lora\.ranks=\[\] is not allowed: ranks are whole numbers from 1"),
        ("{4: 0.5, 8: 0.6}", r"lora\.ranks=.* is not allowed: shares of ranks are positive and add up to 1"),
        ("{4: -1, 8: 2}", r"lora\.ranks=.* is not allowed: shares of ranks are positive and add up to 1"),
        ("{low: 5, high: 5}", r"lora\.ranks=.* is not allowed: high=5 should be above low=5"),
        ("{low: 5, hi: 9}", r"lora\.ranks=.* is not allowed: a rule has the keys low, high, share, not 'hi'"),
        ("{low: 0}", r"lora\.ranks\.low=0 is not allowed: .*greater than or equal to 1"),
        ("{low: 2, share: 1}", r"lora\.ranks\.share=1 is not allowed: .*less than 1"),
        ("[2, 4]", r"lora\.ranks lists 2 ranks for clients=4; one per client"),
    ],
)
def test_wrong_values_are_one_line(text, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        configfile.build({**FOUR, **configfile.parse_overrides([f"lora.ranks={text}"])})
    assert "\n" not in str(error.value)


RANKS = {"lora.ranks": [2, 4, 4, 8]}
SVD_ORDER = {"lora.truncation": "svd"}


@pytest.mark.parametrize(
    ("strategy", "changes", "message"),
    [
        ("fedit", RANKS, r"strategy=fedit does not go with lora\.ranks: .*clients of one rank"),
        ("fedit", {"lora.ranks": {"low": 2}}, r"strategy=fedit does not go with lora\.ranks"),
        ("fedex-lora", RANKS, r"does not go with lora\.ranks: .*use flora or oracle"),
        ("fedsa-lora", RANKS, r"does not go with lora\.ranks: .*clients of one rank"),
        ("centralised", RANKS, r"does not go with lora\.ranks: .*there is one client"),
        ("flora", {"lora.variant": "dora"}, r"does not go with lora\.variant=dora: .*DoRA's norm depends on the base"),
        ("oracle", {"lora.variant": "hira"}, r"does not go with lora\.variant=hira: .*HiRA's gate depends on the"),
        ("fedex-lora", {"lora.variant": "hira"}, r"does not go with lora\.variant=hira"),
        ("ffa-lora", {"lora.variant": "dora"}, r"does not go with lora\.variant=dora: .*exact only for products"),
        ("ffa-lora", SVD_ORDER, r"does not go with lora\.truncation=svd: .*must stay as it is"),
        ("local", SVD_ORDER, r"does not go with lora\.truncation=svd"),
    ],
)
def test_combinations_that_cannot_work(strategy, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        configfile.build({**FOUR, "strategy": strategy, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        *((name, RANKS) for name in ("flora", "flexlora", "svd", "zero-padding", "hetlora", "replication", "oracle")),
        ("fedit", {"lora.ranks": [4, 4, 4, 4]}),
        ("fedex-lora", {"lora.ranks": {4: 1.0}}),
        ("flora-na", {"lora.variant": "dora"}),
        ("fedit", {"lora.variant": "hira"}),
        ("centralised", {"lora.variant": "dora"}),
        ("svd", {**RANKS, **SVD_ORDER}),
    ],
)
def test_combinations_that_do(strategy, changes):
    configfile.build({**FOUR, "strategy": strategy, **changes})


# -- who gets which


def test_a_list_and_a_rule_say_it_themselves():
    assert ranks.at_start(LoraConfig(), 3, 0) == {}
    assert ranks.at_start(LoraConfig(ranks=[4, 2, 8]), 3, 0) == {0: 4, 1: 2, 2: 8}
    assert ranks.at_start(LoraConfig(ranks=RULE), 3, 0) == {0: 2, 1: 2, 2: 2}
    assert [LoraConfig(ranks=r).highest_rank for r in (None, [4, 2], {2: 0.9, 16: 0.1}, RULE)] == [8, 4, 16, 4]


@pytest.mark.parametrize(("clients", "counts"), [(10, {2: 5, 4: 3, 16: 2}), (7, {2: 4, 4: 2, 16: 1}), (1, {2: 1})])
def test_shares_are_dealt_by_seed(clients, counts):
    lora = LoraConfig(ranks={16: 0.2, 2: 0.5, 4: 0.3})
    dealt = ranks.at_start(lora, clients, seed=3)
    assert list(dealt) == list(range(clients))
    assert {rank: list(dealt.values()).count(rank) for rank in set(dealt.values())} == counts
    assert ranks.at_start(lora, clients, seed=3) == dealt
    if clients > 1:
        assert len({tuple(ranks.at_start(lora, clients, seed).values()) for seed in range(9)}) > 3


def test_the_best_rise_after_round_one_and_only_then():
    lora, losses = LoraConfig(ranks=RULE), {7: 0.5, 1: 0.2, 4: 0.2, 2: 0.9}
    assert ranks.after_round(lora, 1, losses, 10) == {1: 4, 4: 4, 7: 4}
    assert ranks.after_round(lora, 1, losses, 7) == {1: 4, 4: 4}
    assert ranks.after_round(lora, 1, losses, 2) == {1: 4}  # at least one; the lower id where losses are equal
    assert ranks.after_round(lora, 2, losses, 10) == {}
    assert ranks.after_round(LoraConfig(ranks=[2, 4]), 1, losses, 10) == {}


def test_a_tenth_is_held_out_in_round_one_under_a_rule():
    rows, lora = np.arange(100, 157), LoraConfig(ranks=RULE)
    kept, held = ranks.hold_out(lora, 1, rows, 0, client=2)
    assert (len(kept), len(held)) == (51, 6)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), rows)
    assert not np.array_equal(held, ranks.hold_out(lora, 1, rows, 0, client=3)[1])
    assert [len(part) for part in ranks.hold_out(lora, 1, rows[:2], 0, 0)] == [1, 1]
    for other in (ranks.hold_out(lora, 2, rows, 0, 2), ranks.hold_out(LoraConfig(), 1, rows, 0, 2)):
        np.testing.assert_array_equal(other[0], rows)
        assert len(other[1]) == 0


# -- in a run


def record(folder, number, client_id) -> dict:
    run = RunFolder(folder)
    found = run.read_record(run.client_stem(number, client_id))
    assert found is not None
    return found


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "hira"])
def test_clients_train_send_and_receive_at_their_own_rank(finished, variant):
    folder = finished({**MIXED, "lora.variant": variant})
    run = RunFolder(folder)
    for number in (1, 2):
        state = run.read_state(number - 1)
        assert state.adapter.rank == 7
        for client_id, rank in enumerate((2, 4, 7)):
            upload = Adapter.from_tensors(run.read_tensors(run.client_stem(number, client_id)))
            assert {pair.rank for pair in upload.factors.values()} == {rank}
            found = record(folder, number, client_id)
            assert found["rank"] == rank
            up, down = (wire_size(a, EVERY_PART) for a in (upload, state.adapter.cut(rank)))
            sent = {"up_adapter": up[0], "up_head": up[1], "down_adapter": down[0], "down_head": down[1]}
            assert found["bytes"] == {**sent, "down_base": 0}
    table = json.loads((folder / "tables/clients.json").read_text())
    assert [row["rank"] for row in table] == [2, 4, 7] * 2
    assert bool(run.read_state(2).adapter.magnitudes) == (variant == "dora")


def test_all_of_one_rank_is_that_rank(finished):
    plain = RunFolder(finished({"lora.rank": 4, "lora.alpha": 8})).read_state(2).adapter.tensors()
    listed = RunFolder(finished({"lora.alpha": 16, "lora.ranks": [4, 4, 4]})).read_state(2).adapter.tensors()
    assert plain.keys() == listed.keys()
    assert all(torch.equal(tensor, listed[name]) for name, tensor in plain.items())


@pytest.fixture(scope="module")
def ruled(finished):
    """A run in which one client of three rises."""
    return finished({"strategy": "replication", "lora.ranks": {"low": 2, "high": 4, "share": 0.3}, "rounds": 3})


def test_under_a_rule_the_client_with_the_lowest_validation_loss_rises(ruled):
    losses = {u: Confusion.from_json(record(ruled, 1, u)["validation"]).loss for u in range(3)}
    best = min(losses, key=losses.get)
    assert len(set(losses.values())) == 3
    assert RunFolder(ruled).read_state(1).ranks == {u: 4 if u == best else 2 for u in range(3)}
    for number in (1, 2, 3):
        seen = [record(ruled, number, u)["rank"] for u in range(3)]
        assert seen == [2, 2, 2] if number == 1 else [4 if u == best else 2 for u in range(3)]
        assert all((record(ruled, number, u)["validation"] is None) == (number > 1) for u in range(3))


def test_the_validation_loss_is_that_of_held_out_examples(ruled):
    """The client's turn by hand: trained without its held-out tenth, then scored on that."""
    run = RunFolder(ruled)
    setup, config = run.need_json("setup.json"), run.config
    data, parts = tokens.open_tokens(run.path / setup["tokens"]), Partition.load(run.path / "partition.npz")
    model = ResidentModel.build(OBJECTIVE, config.model, config.lora, data.labels, 0, 99, torch.device("cpu"))
    rows, held = ranks.hold_out(config.lora, 1, parts.train[1], config.seed, 1)
    start, examples = run.read_state(0).adapter.cut(2), tokens.examples(data.train, rows)
    client.train(model, start, examples, config.training, client.Turn(config.seed, 1, 1), EVERY_PART, data.padding)
    expected = OBJECTIVE.evaluate(model, tokens.examples(data.train, held), 64, data.padding)
    found = record(ruled, 1, 1)
    assert found["examples"] == len(rows) == len(parts.train[1]) - len(held)
    assert Confusion.from_json(found["validation"]).to_json() == expected.to_json()
    assert record(ruled, 2, 1)["examples"] == len(parts.train[1])


def test_hetlora_prunes_ranks_over_rounds_and_goes_on(finished):
    changes = {**MIXED, "strategy": "hetlora", "rounds": 4, "training.local_steps": 8}
    folder = finished({**changes, "strategy_options": {"keep": 0.6, "penalty": 5.0}})
    seen = np.array([[record(folder, number, u)["rank"] for u in range(3)] for number in (1, 2, 3, 4)])
    assert seen[0].tolist() == [2, 4, 7]  # B is zero at first: no tail to be smaller than
    assert (np.diff(seen, axis=0) <= 0).all()
    assert (seen[-1] < seen[0]).any()
    run = RunFolder(folder)
    assert [run.read_state(4).rank_of(u) for u in range(3)] == seen[-1].tolist()
    assert run.read_state(4).adapter.rank == 7
    assert len(rounds.records(run)) == 5
    never = finished({**changes, "strategy_options": {"keep": 1.0, "penalty": 5.0}})
    assert [record(never, 4, u)["rank"] for u in range(3)] == [2, 4, 7]


@pytest.mark.parametrize("strategy", ["zero-padding", "replication"])
def test_svd_order_changes_what_low_ranks_receive_and_not_the_global_product(finished, strategy):
    mixed = {**MIXED, "strategy": strategy}
    first, ordered = (RunFolder(finished({**mixed, "lora.truncation": t})).read_state(1) for t in ("first", "svd"))
    for module, pair in first.adapter.factors.items():
        product, turned = pair.to_double().product(), ordered.adapter.factors[module].to_double()
        torch.testing.assert_close(turned.product(), product, rtol=0, atol=1e-6 * float(product.abs().max()))
        left, values, right = torch.linalg.svd(product)
        best = (left[:, :2] * values[:2]) @ right[:2]
        low = [p.at_rank(2).product() for p in (pair.to_double(), turned)]
        torch.testing.assert_close(low[1], best, rtol=0, atol=1e-5 * float(product.abs().max()))
        assert (low[1] - product).norm() < 0.99 * (low[0] - product).norm()
    assert ordered.ranks == first.ranks
