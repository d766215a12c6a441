"""Faults made on purpose: drawn by (seed, round, client, attempt) alone, and damage that is what its name says."""

import dataclasses

import numpy as np
import pytest
import torch

from fedlora.adapter import Adapter
from fedlora.channel import faults as channel
from fedlora.channel.faults import Fate, Message
from fedlora.run.inspection import change_norm
from fedlora.seeds import Turn

FAULTS = {"channel.faults.crash": 0.3, "channel.faults.corrupt": 0.5, "channel.faults.delay": "exponential"}


def fates(config, rounds=40, clients=25, attempt=0) -> list[Fate]:
    return [channel.fate(config, Turn(config.seed, t, u, attempt)) for t in range(1, rounds) for u in range(clients)]


class TestFate:
    def test_without_faults_everybody_arrives_at_once_and_unharmed(self, configure):
        assert all(f.arrives(1e-9) and f.damage is None for f in fates(configure()))

    def test_depends_on_seed_round_client_and_attempt_and_on_nothing_else(self, configure):
        one = fates(configure(FAULTS))
        assert one == fates(configure({**FAULTS, "strategy": "flora", "runner.kind": "processes", "rounds": 9}))
        assert one != fates(configure({**FAULTS, "seed": 1}))
        assert one != fates(configure(FAULTS), attempt=1)
        assert len({dataclasses.astuple(f) for f in one}) == len(one)

    def test_one_fault_does_not_move_the_others(self, configure):
        few, many = fates(configure({"channel.faults.crash": 0.3})), fates(configure(FAULTS))
        assert [f.crashes for f in few] == [f.crashes for f in many]

    def test_probabilities_are_those_of_the_configuration(self, configure):
        drawn = fates(configure(FAULTS))
        assert np.mean([f.crashes for f in drawn]) == pytest.approx(0.3, abs=0.05)
        assert np.mean([f.damage is not None for f in drawn]) == pytest.approx(0.5, abs=0.05)
        assert {f.damage for f in drawn} - {None} == set(configure().channel.faults.kinds)

    @pytest.mark.parametrize(("name", "median"), [("exponential", 20 * np.log(2)), ("lognormal", 20)])
    def test_delays_have_the_distribution_that_was_asked_for(self, configure, name, median):
        delays = [
            f.delay_s for f in fates(configure({"channel.faults.delay": name, "channel.faults.delay_s": 20}), 80, 40)
        ]
        assert np.median(delays) == pytest.approx(median, rel=0.1)
        spread = {"exponential": np.std(delays) / np.mean(delays), "lognormal": np.std(np.log(delays))}[name]
        assert spread == pytest.approx(1, rel=0.1)

    def test_a_deadline_is_for_those_who_come_later(self):
        assert Fate(delay_s=5.0).arrives(5.0)
        assert Fate(delay_s=5.0).arrives(None)
        assert not Fate(delay_s=5.1).arrives(5.0)
        assert not Fate(crashes=True).arrives(None)

    def test_a_control_that_trains_on_all_data_meets_none(self, configure):
        assert set(fates(configure({**FAULTS, "strategy": "centralised"}))) == {Fate()}


class TestTicket:
    def test_no_two_requests_have_the_same(self):
        turns = [Turn(0, t, u, a) for t in range(9) for u in range(9) for a in range(3)]
        assert len({channel.ticket(turn) for turn in turns}) == len(turns)


@pytest.fixture
def sent(uploads):
    """What a client was sent, and its upload: every value moved a little."""
    start = uploads.adapter(1)
    moved = {name: tensor + 0.01 for name, tensor in start.tensors().items()}
    return start, Message(moved, {"round": 3, "client": 2, "ticket": channel.ticket(Turn(0, 3, 2))})


@pytest.fixture
def spoil(sent):
    """`spoil("nan")`: the message after that damage."""
    return lambda kind: channel.damaged(sent[1], kind, sent[0], Turn(0, 3, 2))


class TestDamage:
    def test_of_values_and_shapes(self, spoil, sent):
        whole, first = sent[1].tensors, Adapter.from_tensors(sent[1].tensors).modules[0]
        changed = {
            kind: {n for n, t in spoil(kind).tensors.items() if n not in whole or not torch.equal(t, whole[n])}
            for kind in ("nan", "shape", "rank", "norm", "missing-module", "extra-module")
        }
        names = {part: f"base_model.model.{first}.lora_{part}.weight" for part in "AB"}
        assert changed["nan"] == {names["B"]}
        assert changed["shape"] == {names["A"]}
        assert changed["rank"] == set(names.values())
        assert changed["missing-module"] == set()
        assert len(spoil("missing-module").tensors) == len(whole) - 2
        assert len(changed["extra-module"]) == 2
        assert len(spoil("extra-module").tensors) == len(whole) + 2
        assert torch.isnan(spoil("nan").tensors[names["B"]]).sum() == 1

    def test_of_the_norm(self, spoil, sent):
        honest = Adapter.from_tensors(sent[1].tensors)
        blown = Adapter.from_tensors(spoil("norm").tensors)
        factors = sum(t.numel() for name, t in honest.tensors().items() if "lora_" in name)
        assert change_norm(blown, sent[0]) == pytest.approx(1e6 * 0.01 * factors**0.5, rel=0.01)

    def test_of_what_it_says_of_itself(self, spoil, sent):
        assert spoil("stale-round").record == {**sent[1].record, "round": 2}
        assert spoil("replay").record == {**sent[1].record, "ticket": channel.ticket(Turn(0, 2, 2))}

    def test_of_the_file(self, spoil):
        content = bytes(range(200))
        assert spoil("truncated").on_the_way(content) == content[:100]
        flipped = spoil("bit-flip").on_the_way(content)
        assert sum((a ^ b).bit_count() for a, b in zip(content, flipped, strict=True)) == 1
