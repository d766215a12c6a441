"""Rounds in which clients drop out, come late or send rubbish: who counts, with which weight, and who is asked next."""

import shutil

import numpy as np
import pytest
import torch

from fedlora import metrics
from fedlora.adapter import Adapter
from fedlora.adapter.updates import Update, Updates
from fedlora.channel import faults as channel
from fedlora.errors import ClientFailed, ConfigError, RunAborted
from fedlora.run import participation, rounds
from fedlora.run.loop import train
from fedlora.run.participation import Ask, Entry, Roll
from fedlora.run.records import ClientRecord
from fedlora.run.runfolder import RunFolder
from fedlora.seeds import Turn
from fedlora.strategies import registry
from fedlora.training import client

FAULTY = {
    "clients": 8,
    "rounds": 3,
    "seed": 4,
    "training.local_steps": 1,
    "evaluation.local": False,
    "channel.faults.crash": 0.2,
    "channel.faults.corrupt": 0.3,
    "channel.faults.delay": "exponential",
    "channel.deadline_s": 15,
}
DELAYED = {**FAULTY, "channel.faults.crash": 0, "channel.faults.corrupt": 0}


def last_state(folder) -> bytes:
    return (folder / "rounds/003/state.safetensors").read_bytes()


@pytest.fixture(scope="module")
def faulty(finished):
    return RunFolder(finished(FAULTY))


class TestWhoCounts:
    def test_every_way_to_fail_is_there_and_is_what_was_drawn(self, faulty, configure):
        config = configure(FAULTY)
        statuses = set()
        for number in (1, 2, 3):
            for entry in participation.read(faulty, number).entries:
                fate = channel.fate(config, Turn(config.seed, number, entry.client, entry.attempt))
                expected = "crashed" if fate.crashes else "late" if fate.delay_s > 15 else None
                expected = expected or ("rejected" if fate.damage else "completed")
                assert entry.status == expected
                statuses.add(entry.status)
        assert statuses == {"crashed", "late", "rejected", "completed"}

    def test_weights_are_those_of_the_completed_alone(self, faulty):
        """The state after each round is that of an aggregate that never heard of the others."""
        strategy = registry.make("fedit")
        for number in (1, 2, 3):
            done = participation.read(faulty, number).completed
            records = [faulty.need_json(f"{faulty.client_stem(number, u)}.json") for u in done]
            adapters = [Adapter.from_tensors(faulty.read_tensors(faulty.client_stem(number, u))) for u in done]
            updates = Updates.collect(
                Update(u, r["examples"], a) for u, r, a in zip(done, records, adapters, strict=True)
            )
            new = strategy.aggregate(faulty.read_state(number - 1), updates)
            mine = faulty.read_state(number).adapter
            weights = np.array([r["examples"] for r in records]) / sum(r["examples"] for r in records)
            for module, pair in mine.factors.items():
                assert torch.equal(pair.B, new.adapter.factors[module].B)
                mean = sum(w * a.factors[module].B.double() for w, a in zip(weights, adapters, strict=True))
                assert torch.allclose(pair.B.double(), mean, atol=1e-7)

    def test_metrics_say_how_many_were_selected_and_what_became_of_them(self, faulty):
        for record in rounds.records(faulty)[1:]:
            counts = participation.read(faulty, record.round).counts()
            assert record.metrics[metrics.CLIENTS_SELECTED] == sum(counts.values()) == 8
            assert record.metrics[metrics.CLIENTS_COMPLETED] == counts["completed"] == len(record.clients)
            for status in set(counts) - {"completed"}:
                assert record.metrics[f"clients/{status}"] == counts[status]

    def test_the_table_says_why(self, faulty):
        import json

        rows = json.loads((faulty.path / "tables/clients.json").read_text())
        assert len(rows) == 24
        for row in rows:
            failed = row["status"] != "completed"
            assert (row["reason"] is not None) == failed
            assert (row["loss"] is None) == failed
            assert row["bytes_down"] > 0
            assert (row["bytes_up"] > 0) == (row["status"] in ("completed", "late", "rejected"))
        assert any("dropped out" in (row["reason"] or "") for row in rows)

    def test_bytes_in_vain_are_counted(self, faulty):
        before = 0.0
        for number, record in enumerate(rounds.records(faulty)[1:], start=1):
            each = faulty.need_json(faulty.record_name(number))["rows"]["clients"]
            assert record.metrics[metrics.BYTES_TOTAL] - before == sum(row["bytes"] for row in each)
            before = record.metrics[metrics.BYTES_TOTAL]

    def test_rejected_updates_are_kept_apart(self, faulty):
        for number in (1, 2, 3):
            for entry in participation.read(faulty, number).having("rejected"):
                folder = faulty.round_folder(number)
                assert (folder / f"rejected-{entry.client:03d}-0.json").exists()
                assert not (folder / f"client-{entry.client:03d}.json").exists()


class TestSameBits:
    """In worker processes too: see test_resume.py."""

    @pytest.mark.parametrize(
        "left", ["before anybody was received", "after a rejected one was put aside", "before the state"]
    )
    def test_after_an_interruption(self, configure, faulty, tmp_path, left):
        folder = shutil.copytree(faulty.path, tmp_path / "run")
        lost = {
            "before anybody was received": ["rejected-*", "state.*", "roll.json"],
            "after a rejected one was put aside": ["state.*", "roll.json"],
            "before the state": ["state.*"],
        }[left]
        for pattern in [*lost, "record.json"]:
            for path in (folder / "rounds/003").glob(pattern):
                path.unlink()
        train(configure(FAULTY), folder)
        assert last_state(folder) == last_state(faulty.path)
        assert (folder / "rounds/003/roll.json").read_bytes() == (faulty.path / "rounds/003/roll.json").read_bytes()


class TestOverSelection:
    def test_the_first_to_arrive_are_taken(self, configure, finished):
        changes = {**DELAYED, "channel.deadline_s": None, "fraction": 0.5, "channel.over_selection": 0.5}
        run = RunFolder(finished(changes))
        config = configure(changes)
        for number in (1, 2, 3):
            roll = participation.read(run, number)
            assert len(roll.entries) == 6
            assert len(roll.completed) == 4
            assert len(roll.having("surplus")) == 2
            delays = {e.client: channel.fate(config, Turn(4, number, e.client)).delay_s for e in roll.entries}
            assert set(roll.completed) == set(sorted(delays, key=delays.get)[:4])
            waited = rounds.read_record(run, number).metrics[metrics.TIME_VIRTUAL]
            assert waited == sorted(delays.values())[3]

    def test_a_rejected_one_is_replaced_by_the_next(self, configure, finished):
        changes = {
            **DELAYED,
            "channel.deadline_s": None,
            "fraction": 0.5,
            "channel.over_selection": 0.5,
            "channel.faults.corrupt": 0.3,
        }
        run = RunFolder(finished(changes))
        rolls = [participation.read(run, number) for number in (1, 2, 3)]
        assert any(roll.having("rejected") and len(roll.completed) == 4 for roll in rolls)


class TestTooFew:
    def test_others_are_asked_and_then_the_same_again(self, configure, tmp_path):
        changes = {**FAULTY, "fraction": 0.5, "channel.min_clients": 4, "channel.attempts": 20, "rounds": 2}
        train(configure(changes), tmp_path / "run")
        run = RunFolder(tmp_path / "run")
        asked_again = False
        for number in (1, 2):
            roll = participation.read(run, number)
            assert len(roll.completed) == 4
            assert roll.attempts > 1
            first = {e.client for e in roll.entries if e.attempt == 0}
            second = [e.client for e in roll.entries if e.attempt == 1]
            done = len([e for e in roll.entries if e.attempt == 0 and e.status == "completed"])
            assert len(second) == 4 - done
            assert not first & set(second)  # 8 clients, 4 asked at first: there are others
            every = [e.client for e in roll.entries]
            asked_again = asked_again or len(set(every)) < len(every)
            assert all(every.count(u) == 1 for u in roll.completed if roll.attempts == 1)
        assert asked_again

    def test_the_run_stops_and_says_what_became_of_them(self, configure, tmp_path):
        with pytest.raises(
            RunAborted, match=r"^round 1: \d of 8 clients completed, fewer than channel.min_clients=8: "
        ):
            train(configure({**FAULTY, "channel.min_clients": 8, "channel.too_few": "stop"}), tmp_path / "run")

    def test_attempts_end(self, configure, tmp_path):
        crash = {**FAULTY, "channel.faults.crash": 1, "channel.attempts": 2}
        with pytest.raises(RunAborted, match=r"round 1: 0 of 8 clients completed in 2 attempts.*dropped out"):
            train(configure(crash), tmp_path / "run")
        with pytest.raises(RunAborted, match=r"in 2 attempts"):  # also when it is tried again
            train(configure(crash), tmp_path / "run")

    def test_who_diverged_is_not_asked_again(self, configure, tmp_path):
        with pytest.raises(RunAborted, match=r"round 1: 0 of 3 clients completed, .*client 0, round 1: the loss is"):
            train(configure({"training.learning_rate": 1e30, "training.max_grad_norm": None}), tmp_path / "run")
        assert participation.read(RunFolder(tmp_path / "run"), 1).counts() == {"failed": 3}

    def test_the_round_goes_on_without_one_that_diverged(self, configure, tmp_path, monkeypatch):
        real = client.train

        def diverges(model, start, examples, training, turn, *rest):
            if (turn.client, turn.round) == (1, 1):
                raise ClientFailed("client 1, round 1: the loss is nan at step 1")
            return real(model, start, examples, training, turn, *rest)

        monkeypatch.setattr(client, "train", diverges)
        said = []
        train(configure(), tmp_path / "run", say=said.append)
        assert said == ["round 1: 2 of 3 clients completed; failed: 1 (client 1, round 1: the loss is nan at step 1)"]
        assert [record.clients for record in rounds.records(RunFolder(tmp_path / "run"))] == [(), (0, 2), (0, 1, 2)]

    def test_the_round_goes_on_without_one_whose_record_is_malformed(self, configure, tmp_path, monkeypatch):
        real = ClientRecord.to_json
        spoilt = {"bytes": {"up_adapter": "many"}}
        monkeypatch.setattr(ClientRecord, "to_json", lambda self: real(self) | (spoilt if self.client == 1 else {}))
        records = train(configure({"rounds": 1}), tmp_path / "run")
        assert records[1].clients == (0, 2)
        (entry,) = participation.read(RunFolder(tmp_path / "run"), 1).having("rejected")
        assert "client 1, round 1: the update does not say what it should" in entry.reason
        assert "up_adapter is 'many'" in entry.reason


class TestWaiting:
    """Virtual seconds of a round."""

    @pytest.mark.parametrize(
        ("entries", "deadline", "seconds"),
        [
            ([("completed", 2.0), ("completed", 7.0)], None, 7.0),
            ([("completed", 2.0), ("crashed", 0.0)], 9.0, 9.0),
            ([("completed", 2.0), ("crashed", 0.0)], None, 2.0),
            ([("completed", 2.0), ("late", 11.0)], 9.0, 9.0),
            ([("completed", 2.0), ("rejected", 3.0), ("surplus", 8.0), ("late", 11.0)], 9.0, 3.0),
        ],
    )
    def test_of_one_attempt(self, configure, entries, deadline, seconds):
        config = configure({"channel.deadline_s": deadline, "channel.faults.delay": "exponential"})
        roll = Roll(tuple(Entry(u, 0, status, delay_s=delay) for u, (status, delay) in enumerate(entries)))
        assert participation.virtual_seconds(config, roll) == seconds

    def test_attempts_follow_one_another(self, configure):
        roll = Roll((Entry(0, 0, "completed", delay_s=2.0), Entry(1, 1, "completed", delay_s=3.0)))
        assert participation.virtual_seconds(configure(), roll) == 5.0


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"channel.min_clients": 4}, r"channel.min_clients=4, but a round has 3 clients"),
            ({"channel.over_selection": 0.5}, r"already has all 3; set fraction below one"),
            ({"channel.deadline_s": 5}, r"virtual delays, and there are none; set channel.faults.delay"),
            ({"channel.faults.kinds": ["nan", "bitflip"]}, r"channel.faults.kinds"),
            ({"channel.faults.kinds": []}, r"channel.faults.kinds"),
            ({"channel.faults.crash": 1.5}, r"channel.faults.crash=1.5"),
            ({"runner.timeout_s": 5}, r"needs runner.kind=processes"),
        ],
    )
    def test_one_line_before_anything_starts(self, configure, changes, message):
        with pytest.raises(ConfigError, match=message):
            configure(changes)


def test_a_line_tells_of_those_who_did_not_complete():
    ask = Ask(2, 0, (0, 1, 2, 3, 4))
    roll = Roll(
        (
            Entry(0, 0, "completed"),
            Entry(1, 0, "crashed", "dropped out"),
            Entry(2, 0, "rejected", "has NaN"),
            Entry(3, 0, "crashed", "dropped out"),
            Entry(4, 0, "completed"),
        )
    )
    assert roll.told(ask) == "round 2: 2 of 5 clients completed; crashed: 1, 3; rejected: 2 (has NaN)"
    assert Roll((Entry(0, 0, "completed"),)).told(Ask(2, 0, (0,))) == ""
