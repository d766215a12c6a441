"""What `make bench-peers` compares, as far as it needs no peer: the exported work is fedlora's, other work is void."""

import json
import sys
from dataclasses import replace

import pytest
import rounds as driver
import torch
from peers import by_hand, exported, measured
from peers.contestants import PEERS, Contestant, Done, Script
from peers.measured import Cost, Void, check_same
from peers.work import Work
from safetensors.torch import load_file

from fedlora.run import rounds
from fedlora.run.runfolder import RunFolder

COST = Cost(start_up=2.0, round=1.0, total=5.0, memory=100.0)


@pytest.fixture(scope="module")
def run(finished) -> RunFolder:
    return RunFolder(finished({"strategy": "fedit", "rounds": 2}))


@pytest.fixture(scope="module")
def work(run, tmp_path_factory):
    """The work of that run."""
    folder = tmp_path_factory.mktemp("work")
    exported.write(run.config, folder)
    return folder


def test_plain_pytorch_on_the_exported_work_does_what_fedlora_does(run, work, tmp_path):
    by_hand.main(work, tmp_path, rounds=2, processes=1)
    mine, theirs = load_file(tmp_path / "round1.safetensors"), run.read_state(1).adapter.tensors()
    assert measured.apart(mine, theirs) <= measured.FARTHEST
    assert measured.apart(mine, run.read_state(0).adapter.tensors()) > 1000 * measured.FARTHEST
    said = [json.loads(line)["accuracy"] for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert said == [record.metrics["global/accuracy"] for record in rounds.records(run)]


def test_two_halves_are_the_whole(work):
    start = {name: tensor.numpy() for name, tensor in Work(work).start.items()}
    halves, whole = [by_hand.Half(work, part, 2) for part in (0, 1)], by_hand.Half(work, 0, 1)
    sums, (once,) = [half.train(1, start) for half in halves], [whole.train(1, start)]
    for name, tensor in once.items():
        assert torch.from_numpy(sums[0][name] + sums[1][name]).allclose(torch.from_numpy(tensor), atol=1e-12)
    scores = [half.score(start) for half in halves]
    assert sum(score.examples for score in scores) == whole.score(start).examples == 60
    assert sum(score.hits for score in scores) == whole.score(start).hits


@pytest.mark.parametrize("changes", [{"strategy": "svd"}, {"training.optimizer": "sgd"}, {"fraction": 0.5}], ids=str)
def test_work_that_peers_would_not_do_is_not_exported(configure, tmp_path, changes):
    with pytest.raises(AssertionError):
        exported.write(configure({"strategy": "fedit", **changes}), tmp_path)


def adapter(moved: float = 0.0) -> dict[str, torch.Tensor]:
    tensors = {"lora_A": torch.zeros(2, 5), "head": torch.ones(3)}
    tensors["lora_A"][1, 3] += moved
    return tensors


def test_what_is_added_up_in_another_order_is_the_same_work():
    assert check_same("pfl", adapter(5e-7), adapter()) == pytest.approx(5e-7)


@pytest.mark.parametrize(
    "other",
    [
        adapter(-2e-6),
        adapter(float("nan")),
        {"lora_A": torch.zeros(2, 5)},
        {**adapter(), "head": torch.ones(1)},
    ],
    ids=["a number is off", "not a number", "the head is missing", "another shape"],
)
def test_other_work_is_void(other):
    with pytest.raises(Void, match=r"after round one the adapter of pfl is .* from that of the limit"):
        check_same("pfl", other, adapter())


class Tells(Contestant):
    """Comes to an adapter that is so far off in each of its executions, the first of them not counted."""

    def __init__(self, *moved: float) -> None:
        self.moved, self.rounds = list(moved), []

    def execute(self, folder, work, changes):
        self.rounds.append(changes["rounds"])
        cost = replace(COST, round=float(len(self.rounds)))
        return Done(cost, adapter(self.moved.pop(0)), {"torch": "2"})


def test_the_comparison_ends_with_the_first_who_does_other_work(tmp_path):
    limit, good, bad = Tells(0.0, 0.0), Tells(0.0, 0.0), Tells(0.0, 0.1)
    with pytest.raises(Void, match=r"of second is 0\.1 from"):
        driver.compare(tmp_path / "work", {"rounds": 6}, {"first": good, "second": bad, "limit": limit}, repeats=3)
    assert limit.rounds == good.rounds == bad.rounds == [1, 6]


def test_each_runs_once_without_being_counted_and_then_by_turns(tmp_path):
    contestants = {"slow": Tells(0.0, 3e-7, 0.0, 0.0), "limit": Tells(0.0, 0.0, 0.0, 0.0)}
    found = driver.compare(tmp_path / "work", {"rounds": 3}, contestants, repeats=3)
    assert [run["round"] for run in found["slow"]["runs"]] == [2.0, 3.0, 4.0]
    assert found["slow"]["apart"] == pytest.approx(3e-7)
    assert list(found) == ["slow", "limit"]


def test_the_table_says_the_share_of_the_limit():
    found = {
        name: {"runs": [vars(replace(COST, round=seconds)) for seconds in each]}
        for name, each in {"limit": (2.0, 2.2, 1.5), "pfl": (4.0, 5.0, 3.5)}.items()
    }
    lines = driver.table("W2", found).splitlines()
    assert lines[2] == "| limit | 2.0 (2.0–2.0) | 2.00 (1.50–2.20) | 100% | 5.0 (5.0–5.0) | 100 (100–100) |"
    assert "| 4.00 (3.50–5.00) | 50% |" in lines[3]


def test_start_up_is_all_that_happens_once():
    """Ten seconds before anything, four more in the first round; rounds of 2, 3 and 2 seconds; a second to the end."""
    cost = Cost.of(begun=100.0, scored=[110.0, 116.0, 118.0, 121.0, 123.0], ended=124.0, memory=1.0)
    assert (cost.round, cost.start_up, cost.total) == (2.0, 14.0, 24.0)


def test_memory_and_failure_of_a_command(tmp_path):
    hold = "import time; held = bytearray(200_000_000); time.sleep(1.5)"
    begun, ended, memory = measured.run([sys.executable, "-c", hold], {}, tmp_path / "log.txt")
    assert ended - begun > 1.5
    assert 200 < memory < 300
    with pytest.raises(SystemExit, match=r"(?s)no such work.*ended with 1"):
        measured.run([sys.executable, "-c", "raise SystemExit('no such work')"], {}, tmp_path / "log.txt")


def test_who_is_not_installed_is_told_how(tmp_path, monkeypatch):
    monkeypatch.setattr("peers.contestants.ENVIRONMENTS", tmp_path)
    absent = PEERS["pfl"]
    assert isinstance(absent, Script)
    with pytest.raises(SystemExit, match="make bench-peers"):
        absent.execute(tmp_path / "out", tmp_path, {"rounds": 1})
