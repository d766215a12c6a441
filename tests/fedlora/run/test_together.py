"""Runs whose clients are trained together: a client is still what is saved, failed, left out and made again alone."""

import shutil
from dataclasses import replace

import pytest
import torch

from fedlora.adapter import Factors
from fedlora.config import configfile
from fedlora.errors import ClientFailed
from fedlora.files import home
from fedlora.run import extension, participation, together
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder
from fedlora.seeds import Turn
from fedlora.training import calibration, cohort
from fedlora.training.client import Trained
from fedlora.training.cohort import Member
from fedlora.training.draws import CannotShare
from fedlora.training.workers import Workbench

SIX = {"clients": 6, "rounds": 1, "training.local_steps": None, "training.local_epochs": 0.5, "training.cohort": 4}


@pytest.fixture(scope="module")
def run(configure, shared):
    """`run({...})`: a finished run of six clients, and what it said; made once."""

    def finished(changes=None):
        config = configure({**SIX, **(changes or {})})

        def make(path):
            said = []
            train(config, path, say=said.append)
            (path / "said.txt").write_text("\n".join(said))

        path = shared(f"together-{config.digest()}", make)
        return RunFolder(path), (path / "said.txt").read_text()

    return finished


def uploads(folder, number=1):
    return [folder.read_tensors(folder.client_stem(number, client)) for client in range(6)]


def test_every_client_sends_what_it_sends_alone(run):
    (alone, _), (at_once, said) = run({"training.cohort": 1}), run()
    assert "training.cohort" not in said
    pairs = list(zip(uploads(alone), uploads(at_once), strict=True))
    for one, other in pairs:
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    assert any(not torch.equal(one[name], other[name]) for one, other in pairs for name in one), "nothing was shared"
    for client in range(6):
        records = [each.read_record(each.client_stem(1, client)) for each in (alone, at_once)]
        assert len(records[0]["losses"]) == len(records[1]["losses"])
        assert records[0]["ticket"] == records[1]["ticket"]
        assert records[1]["local"]["loss_sum"] == pytest.approx(records[0]["local"]["loss_sum"], rel=1e-3)
        assert records[1]["seconds"] > 0
    lengths = {len(at_once.read_record(at_once.client_stem(1, client))["losses"]) for client in range(6)}
    assert len(lengths) > 1, "clients of one length show nothing of those who leave early"


def test_what_is_missing_is_made_again_with_the_same_bits(run, tmp_path):
    whole, _ = run()
    path = shutil.copytree(whole.path, tmp_path / "run")
    for name in ("record.json", "roll.json", "state.json", "state.safetensors", "client-001.json", "client-005.json"):
        (path / "rounds" / "001" / name).unlink()
    kept = (path / "rounds" / "001" / "client-000.json").stat().st_mtime_ns
    train(whole.config, path)
    for one, other in zip(uploads(whole), uploads(RunFolder(path)), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert (path / "rounds" / "001" / "client-000.json").stat().st_mtime_ns == kept


def test_faults_hit_the_clients_that_they_hit_alone(run):
    faults = {"channel.faults.crash": 0.4, "channel.min_clients": 1, "seed": 2}
    rolls = [participation.read(run({**faults, "training.cohort": size})[0], 1) for size in (1, 4)]
    statuses = [[(entry.client, entry.status) for entry in roll.entries] for roll in rolls]
    assert statuses[0] == statuses[1]
    assert len({status for _, status in statuses[0]}) == 2


def test_a_client_that_diverges_fails_alone(configure, tmp_path, monkeypatch, run):
    real = cohort.train

    def poisoned(model, members, *how):
        """The second client starts from numbers that are none."""
        members = list(members)
        for place, each in enumerate(members):
            if each.turn.client == 1:
                broken = {module: Factors(pair.B / 0, pair.A) for module, pair in each.start.factors.items()}
                members[place] = replace(each, start=each.start.with_factors(broken))
        return real(model, members, *how)

    whole, _ = run()
    train_in = RunFolder.create(tmp_path / "run", configure({**SIX, "channel.min_clients": 1}))
    monkeypatch.setattr("fedlora.run.together.sharing.tried", lambda *_: "")
    monkeypatch.setattr(cohort, "train", poisoned)
    train(train_in.config, tmp_path / "run")
    roll = participation.read(train_in, 1)
    assert [(entry.client, entry.status) for entry in roll.entries if entry.status != "completed"] == [(1, "failed")]
    assert "client 1, round 1: the loss is nan at step 1" in roll.having("failed")[0].reason
    for client in (0, 2, 3, 4, 5):
        one, other = (each.read_tensors(each.client_stem(1, client)) for each in (whole, train_in))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_cannot_be_shared_is_trained_one_by_one_and_said_with_the_reason(run):
    (alone, _), (at_once, said) = (run({"lora.variant": "hira", "training.cohort": size}) for size in (1, 4))
    assert said.startswith("training.cohort=4: clients are trained one by one, because HiRA multiplies")
    for one, other in zip(uploads(alone), uploads(at_once), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_auto_takes_what_was_measured_and_measures_once(configure, tmp_path, monkeypatch):
    shutil.rmtree(home.cache() / "cohort", ignore_errors=True)
    measured = []

    def fast(model, members, training, padding):
        measured.append(len(members))
        return {1: 10.0, 2: 19.0, 4: 35.0, 8: 50.0}

    monkeypatch.setattr(calibration, "measure", fast)
    sizes = []
    for clients in (6, 3):
        said, config = [], configure({**SIX, "clients": clients, "training.cohort": "auto"})
        train(config, tmp_path / str(clients), say=said.append)
        sizes.append(together.size(RunFolder(tmp_path / str(clients))))
        line = f"training.cohort=auto: {sizes[-1]} at a time (steps of clients a second by clients at a time: 1: 10,"
        assert any(each.startswith(line) for each in said)
    assert sizes == [4, 2]
    assert len(measured) == 1


def test_the_digest_knows_of_it_where_it_changes_the_last_bits():
    usual, four, auto = (configfile.build({"training.cohort": size}).digest() for size in (1, 4, "auto"))
    assert usual == configfile.build({}).digest()
    assert len({usual, four, auto}) == 3


# -- what is settled while they train


@pytest.fixture
def asked(run):
    """`asked(at_once, count)`: so many members trained so; how many in one pass each time, and what was said."""
    folder, _ = run()
    bench = Workbench("cpu")

    def train_them(at_once, count):
        said, passes = [], []

        def several(members):
            passes.append(len(members))
            return at_once(members)

        def alone(member):
            passes.append(1)
            return trained(member)

        members = [Member(None, None, Turn(0, 1, client)) for client in range(count)]
        came = together.train(bench, folder, members, alone, several, said.append)
        assert [each.losses for each in came] == [[float(client)] for client in range(count)]
        return passes, said

    return train_them


def trained(member):
    return Trained(None, [float(member.turn.client)], 0.0)


def at_most(most):
    def several(members):
        if len(members) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [trained(each) for each in members]

    return several


def test_a_cohort_that_the_memory_is_too_small_for_is_halved_once_and_for_all(asked):
    passes, said = asked(at_most(3), 4)
    assert passes == [4, 2, 2]
    why = "because the memory of cpu is too small for 4"
    assert said == [f"training.cohort=4: from now on 2 at a time, {why}; set training.cohort=2"]
    assert asked(at_most(3), 4) == ([2, 2], [])


def test_what_turns_out_to_be_not_understood_goes_on_one_by_one(asked):
    def several(members):
        raise CannotShare("of odd draws")

    passes, said = asked(several, 3)
    assert passes == [3, 1, 1, 1]
    assert said == ["training.cohort=4: from now on 1 at a time, because of odd draws; set training.cohort=1"]


def test_one_that_fails_alone_is_a_result(run):
    def fails(member):
        raise ClientFailed("diverged")

    [came] = together.train(Workbench("cpu"), run()[0], [Member(None, None, Turn(0, 1, 0))], fails, None, None)
    assert str(came) == "diverged"


def test_a_run_that_is_gone_on_with_keeps_what_was_settled(run, tmp_path):
    whole, _ = run()
    longer = extension.extend(whole, extension.extended(whole, {"rounds": 2}), tmp_path / "longer")
    assert together.is_settled(longer)
    assert together.size(longer) == 4
