"""A worker that sees nothing of the run folder does what one beside it does."""

import json
import logging
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fedlora.errors import WorkerError
from fedlora.files.tensorfile import read_tensors
from fedlora.run import mirror, rounds
from fedlora.run.depot import Depot
from fedlora.run.participation import Ask
from fedlora.run.request import Answer, Sent
from fedlora.run.runfolder import RunFolder
from fedlora.strategies import registry

OTHERS = {
    "mixed ranks": {"strategy": "replication", "lora.ranks": [2, 4, 8]},
    "dora": {"lora.variant": "dora"},
    "cohorts of two": {"training.cohort": 2},
    "faults": {"channel.faults.corrupt": 0.5, "channel.faults.crash": 0.2},
}
FAMILIES = {name: {"strategy": name} for name in registry.names()} | OTHERS


class Store(dict):
    """An engine's store, in this process."""

    def put(self, content):
        self[len(self)] = content
        place = len(self) - 1

        def get():
            if place not in self:
                raise LookupError(place)
            return self[place]

        return SimpleNamespace(get=get)


@pytest.fixture
def far(monkeypatch, tmp_path):
    """As on another machine: a home of its own, and nothing of the run folder to be seen. The process stays, as a
    cluster's does."""
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "elsewhere"))
    return tmp_path / "elsewhere"


@pytest.fixture
def depot(finished, tmp_path):
    """`depot(changes)`: the depot of a finished run whose workers fetch everything, and its store."""

    def of(changes=None, shared=False):
        run, store = RunFolder(shutil.copytree(finished(changes), tmp_path / "run")), Store()
        run.__dict__["config"] = run.config.model_copy(
            update={"runner": run.config.runner.model_copy(update={"kind": "ray", "shared_files": shared})}
        )
        return run, Depot(run, run.read_state, store.put), store

    return of


def arrived(run, number, client):
    """What came of a client in a finished run, accepted or rejected; None for one that sent nothing."""
    stem = run.path / run.client_stem(number, client)
    both = (stem, stem.with_name(f"rejected-{client:03d}-0"))
    return next((each for each in both if each.with_suffix(".json").exists()), None)


@pytest.mark.parametrize("name", FAMILIES)
def test_clients_send_the_same_bits_from_afar(name, depot, far):
    run, office, _ = depot(FAMILIES[name])
    for number in (2, 1):
        asked = [entry["client"] for entry in run.need_json(run.roll_name(number))["entries"]]
        (run.path / run.roll_name(number)).unlink()  # as before it was answered
        answer = mirror.train(office.training(Ask(number, 0, tuple(asked))))
        assert [sent.client for sent in answer.sent] == [c for c in asked if arrived(run, number, c)]
        for sent in answer.sent:
            there = arrived(run, number, sent.client)
            assert sent.tensors == there.with_suffix(".safetensors").read_bytes()
            mine, theirs = (json.loads(c) for c in (sent.record, there.with_suffix(".json").read_bytes()))
            for key in ("seconds", "memory", "seal"):
                mine.pop(key), theirs.pop(key)
            assert mine == theirs
    assert answer.why == (None,) * len(asked)


@pytest.mark.parametrize("name", ["fedit", "flora", "fedsa-lora", "mixed ranks"])
def test_scores_are_the_same_from_afar(name, depot, far):
    from fedlora.run import jobs
    from fedlora.training.workers import Workbench

    run, office, _ = depot(FAMILIES[name])
    parts = [part for part in rounds.evaluation_parts(run, 1) if part.split != "local"]
    here = [jobs.evaluate(Workbench("cpu"), run.path, 1, part).to_json() for part in parts]
    assert [scores.to_json() for scores in mirror.evaluate(office.scoring(1, parts)).scores] == here


def test_files_are_fetched_once_and_only_what_is_new(depot, far):
    _, office, store = depot()
    first = mirror.train(office.training(Ask(1, 0, (0,))))
    assert first.fetched == sum(each.size for each in office.training(Ask(1, 0, (0,))).sets)
    assert mirror.train(office.training(Ask(1, 0, (1,)))).fetched == 0
    second = office.training(Ask(2, 0, (0,)))
    assert mirror.train(second).fetched == second.states.size
    assert office.put_bytes == sum(map(len, store.values())) == first.fetched + second.states.size


def test_nothing_is_put_into_the_store_where_the_folder_is_seen(depot, far):
    _, office, store = depot(shared=True)
    answer = mirror.train(office.training(Ask(1, 0, (0, 1))))
    assert (len(answer.sent), answer.fetched, len(store)) == (2, 0, 0)


def test_a_worker_says_what_it_lacks_and_gets_it(depot, far):
    _, office, store = depot(shared=True)
    request = replace(office.training(Ask(1, 0, (0,))), shared=False)  # as where the folder is not to be seen
    lacking = mirror.train(request)
    assert set(lacking.absent) == {file.digest for each in request.sets for file in each.files}
    assert not lacking.sent
    assert mirror.train(office.supply(request, lacking.absent)).sent
    assert store


def test_what_was_lost_with_a_machine_is_put_there_again(depot, far):
    _, office, store = depot()
    request = office.training(Ask(1, 0, (0,)))
    store.clear()
    lost = mirror.train(request)
    assert lost.absent
    assert mirror.train(office.supply(request, lost.absent)).sent


def test_the_store_forgets_the_states_of_earlier_rounds(depot, far):
    _, office, _ = depot()
    first, second = (office.training(Ask(number, 0, (0,))) for number in (1, 2))
    gone = {file.digest for file in first.states.files}
    assert not gone & office._held.keys()
    assert {file.digest for each in second.sets for file in each.files} == set(office._held)


def test_of_each_piece_that_ends_well_nothing_is_logged(depot, far, caplog):
    _, office, _ = depot()
    mirror.train(replace(office.training(Ask(1, 0, (0,))), quiet=("a.shell",)))
    with caplog.at_level("INFO"):
        logging.getLogger("a.shell").info("Finished in state Completed()")
        logging.getLogger("a.shell").info("Finished in state Failed()")
    assert [record.message for record in caplog.records] == ["Finished in state Failed()"]


def test_a_model_in_a_folder_travels_along(depot, far):
    from fedlora.model.known import KNOWN

    folder = KNOWN["bert-tiny"].location()
    changes = {"model.name": str(folder)}
    run, office, _ = depot(changes)
    request = office.training(Ask(1, 0, (0,)))
    assert request.model is not None
    answer = mirror.train(request)
    named = next((far / "cache" / "far" / "runs").iterdir())
    assert str(far) in RunFolder(named).config.model.name
    assert answer.sent[0].tensors == (run.path / f"{run.client_stem(1, 0)}.safetensors").read_bytes()


def test_what_a_worker_sends_is_written_only_for_clients_that_were_asked(depot, tmp_path):
    _, office, _ = depot()
    request = office.training(Ask(1, 0, (0,)))
    with pytest.raises(WorkerError, match="sent updates of clients 7, who were not asked"):
        office.take(request, Answer("w", sent=(Sent(7, b"", b""),)))


def test_updates_are_written_as_they_were_sent(depot, tmp_path):
    run, office, _ = depot()
    office._run = RunFolder(tmp_path)
    stem = run.path / run.client_stem(1, 0)
    sent = Sent(0, stem.with_suffix(".safetensors").read_bytes(), stem.with_suffix(".json").read_bytes())
    office.take(SimpleNamespace(round=1, clients=(0,)), Answer("w", sent=(sent,)))
    assert RunFolder(tmp_path).read_record(run.client_stem(1, 0)) == run.read_record(run.client_stem(1, 0))
    found = read_tensors(tmp_path / f"{run.client_stem(1, 0)}.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
