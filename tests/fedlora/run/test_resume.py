"""Tiny federated runs a second time: the same bits again, resumed or repaired, and folders that are refused."""

import json
import shutil
import time

import pytest
from alone import train_alone

from fedlora import metrics
from fedlora.errors import RunAborted, RunFolderError
from fedlora.run import rounds
from fedlora.run.loop import train
from fedlora.run.participation import Ask
from fedlora.run.runfolder import RunFolder
from fedlora.run.server import Server, Timings
from fedlora.training import forerunner


def without_times(folder) -> list[dict]:
    records = rounds.records(RunFolder(folder))
    return [metrics.reproducible(record.metrics) for record in records]


def final_bytes(folder) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def copied(finished, tmp_path):
    """A function: a copy of a finished run that a test may damage."""

    def copy(changes=None):
        shutil.copytree(finished(changes), tmp_path / "run")
        return tmp_path / "run"

    return copy


# -- the same bits


FAULTY = {
    "clients": 5,
    "channel.faults.crash": 0.2,
    "channel.faults.corrupt": 0.4,
    "channel.faults.delay": "exponential",
    "channel.deadline_s": 15,
}


def test_two_worker_processes_give_the_bits_of_one_thread(configure, finished, tmp_path):
    """With faults, which are the same ones too."""
    train(configure({**FAULTY, "runner.kind": "processes", "runner.slots": 2}), tmp_path / "run")
    assert final_bytes(tmp_path / "run") == final_bytes(finished(FAULTY))
    assert without_times(tmp_path / "run") == without_times(finished(FAULTY))
    assert any("clients/rejected" in metrics for metrics in without_times(tmp_path / "run"))
    for name in ("tables/divergence.json", "rounds/001/roll.json", "rounds/002/roll.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished(FAULTY) / name).read_bytes(), name


def test_a_run_whose_process_is_killed_is_continued_to_the_same_bits(configure, finished, tmp_path):
    """By SIGKILL, in the middle of a round: `make chaos` does it to the command line, again and again."""
    changes, folder = {"rounds": 5, "strategy": "flora"}, tmp_path / "run"
    process = forerunner.context("cpu").Process(target=train_alone, args=(configure(changes), folder))
    process.start()
    while not (folder / "rounds/002/state.json").exists():
        assert process.is_alive()
        time.sleep(0.005)
    process.kill()
    process.join()
    assert 2 <= len(RunFolder(folder).finished_rounds()) < 5
    train(configure(changes), folder)
    assert final_bytes(folder) == final_bytes(finished(changes))
    assert without_times(folder) == without_times(finished(changes))


def test_another_seed_gives_other_bits(finished):
    assert final_bytes(finished({"seed": 1})) != final_bytes(finished())


INTERRUPTIONS = {
    "after the first round": ["rounds/002", "adapter", "tables"],
    "while a client trained": ["rounds/002/record.json", "rounds/002/state.*", "rounds/002/client-001.*"],
    "between a client's tensors and its record": [f"rounds/002/{name}" for name in ("[rs]*", "client-002.json")],
    "between the state's tensors and its record": ["rounds/002/record.json", "rounds/002/state.json"],
    "before the last evaluation": ["rounds/002/record.json"],
    "before the first evaluation": ["rounds/000/record.json", "rounds/001", "rounds/002", "adapter"],
    "before the first state": ["rounds", "adapter", "adapter_config.json"],
    "while the data was prepared": ["rounds", "adapter", "partition.json", "setup.json"],
    "while it was exported": ["adapter/fedlora.json", "adapter/adapter_config.json", "tables/clients.json"],
}


@pytest.mark.parametrize("moment", INTERRUPTIONS)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(configure, finished, copied, moment):
    folder = copied()
    for pattern in INTERRUPTIONS[moment]:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(configure(), folder)
    assert final_bytes(folder) == final_bytes(finished())
    assert without_times(folder) == without_times(finished())
    for name in ("adapter/fedlora.json", "adapter/adapter_config.json", "tables/divergence.json", "partition.json"):
        assert (folder / name).read_bytes() == (finished() / name).read_bytes(), name
    files = {path.relative_to(folder) for path in folder.rglob("*")}
    assert files == {path.relative_to(finished()) for path in finished().rglob("*")}


CONTINUED = {
    "local": {"strategy": "local"},
    "fedsa-lora": {"strategy": "fedsa-lora"},
    "flora": {"strategy": "flora", "rounds": 3},
    "fedex-lora": {"strategy": "fedex-lora"},
    "oracle, mixed ranks": {"strategy": "oracle", "lora.ranks": [2, 4, 7]},
    "a rule, with its probe": {"strategy": "replication", "lora.ranks": {"low": 2, "high": 4, "share": 0.3}},
    "hetlora": {"strategy": "hetlora", "lora.ranks": [2, 4, 7], "strategy_options": {"keep": 0.6, "penalty": 5.0}},
    "dora": {"strategy": "flora-na", "lora.variant": "dora"},
    "rolora": {"strategy": "rolora"},
    "fed-sb": {"strategy": "fed-sb"},
}


@pytest.mark.parametrize("case", CONTINUED)
def test_what_a_strategy_remembers_outlives_an_interruption(configure, finished, copied, case):
    """Each client's own, the base and what was added last, ranks that fell or rose, magnitudes, cores."""
    changes = CONTINUED[case]
    folder, last = copied(changes), changes.get("rounds", 2)
    for name in ("record.json", "state.json", "state.safetensors", "client-001.json"):
        (folder / f"rounds/{last:03d}/{name}").unlink()
    train(configure(changes), folder)
    whole = finished(changes)
    assert without_times(folder) == without_times(whole)
    tensors = [path.relative_to(whole) for path in whole.rglob("*.safetensors")]
    assert len(tensors) > 8
    for name in [*tensors, "tables/divergence.json"]:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    files = {path.relative_to(folder) for path in folder.rglob("*")}
    assert files == {path.relative_to(whole) for path in whole.rglob("*")}


@pytest.mark.parametrize("changes", [{"strategy": "fedsa-lora"}, {"strategy": "flora", "lora.rank": 60}], ids=str)
def test_a_run_goes_on_from_a_state_of_an_earlier_version(configure, finished, copied, changes):
    """It held identities beside what is added to the base, and all that a client had uploaded."""
    folder, run = copied(changes), RunFolder(finished(changes))
    shutil.rmtree(folder / "rounds/002")
    record, tensors = run.read_record("rounds/001/state"), run.read_tensors("rounds/001/state")
    older = {name: tensor for name, tensor in tensors.items() if not name.endswith(".dense")}
    for kind, update in (("base", run.read_state(1).base), ("base_step", run.read_state(1).base_step)):
        for module, pair in update.modules.items():
            older |= {f"{kind}/{module}.left": pair.B.clone(), f"{kind}/{module}.right": pair.A.clone()}
    for client in run.read_state(1).personal:
        upload = run.read_tensors(run.client_stem(1, client))
        older |= {f"personal/{client}/{name}": tensor for name, tensor in upload.items()}
    assert sum(tensor.numel() for tensor in older.values()) > sum(tensor.numel() for tensor in tensors.values())
    RunFolder(folder).write_tensors("rounds/001/state", older, record)
    train(configure(changes), folder)
    assert without_times(folder) == without_times(finished(changes))
    for path in [
        *finished(changes).glob("adapter/**/*.safetensors"),
        finished(changes) / "rounds/002/state.safetensors",
    ]:
        assert (folder / path.relative_to(finished(changes))).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize(
    ("moment", "marked"),
    [
        ("after the first round", []),
        ("while a client trained", [2]),
        ("before the last evaluation", [2]),
        ("before the first evaluation", []),
    ],
)
def test_a_round_that_another_process_had_begun_is_marked(configure, finished, copied, moment, marked):
    """Its times cover what was left; the server's own are kept with what they were spent on."""
    folder = copied()
    for pattern in INTERRUPTIONS[moment]:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(configure(), folder)
    records = rounds.records(RunFolder(folder))
    assert [record.round for record in records if record.metrics.get("time/resumed")] == marked
    assert not any("time/resumed" in record.metrics for record in rounds.records(RunFolder(finished())))
    if moment == "before the last evaluation":
        before = rounds.records(RunFolder(finished()))[2].metrics
        for name in ("time/read_s", "time/aggregate_s", "time/divergence_s"):
            assert records[2].metrics[name] == before[name] > 0


def test_bytes_of_a_resumed_run_count_who_was_away(configure, finished, copied):
    changes = {"strategy": "rolora", "clients": 5, "fraction": 0.4, "rounds": 4, "training.local_steps": 1}
    folder = copied(changes)
    shutil.rmtree(folder / "rounds/004")
    for path in [*folder.glob("rounds/003/[rs]*"), *list(folder.glob("rounds/003/client-*"))[:2]]:
        path.unlink()
    train(configure(changes), folder)
    assert without_times(folder) == without_times(finished(changes))
    kept = [RunFolder(folder).need_json(f"rounds/{number:03d}/record.json")["rows"]["clients"] for number in (2, 3, 4)]
    assert len({row["bytes_down"] for rows in kept for row in rows}) == 2  # one factor, and both


def test_a_finished_run_is_not_run_again(configure, copied):
    folder = copied()
    before = {path: path.stat().st_mtime_ns for path in (folder / "rounds").rglob("*.safetensors")}
    train(configure(), folder)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "rounds").rglob("*.safetensors")}


def flip(path, at=-5):
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(bytes(content))


def test_a_flipped_byte_in_a_clients_upload_is_noticed_and_the_client_trained_again(configure, finished, copied):
    folder, upload = copied(), "rounds/002/client-001.safetensors"
    (folder / "rounds/002/record.json").unlink()
    for path in folder.glob("rounds/002/state.*"):
        path.unlink()
    flip(folder / upload)
    assert RunFolder(folder).read_record("rounds/002/client-001") is None
    with pytest.raises(RunAborted, match="client 1 in round 2 is missing or was damaged after it was accepted"):
        Server(RunFolder(folder)).aggregate(2)
    said = []
    train(configure(), folder, say=said.append)
    assert [line for line in said if "the update of client 1 of round 2" in line and "made again" in line]
    assert (folder / upload).read_bytes() == (finished() / upload).read_bytes()
    assert final_bytes(folder) == final_bytes(finished())


def test_a_flipped_byte_in_a_state_is_never_built_upon(configure, finished, copied):
    folder = copied()
    shutil.rmtree(folder / "rounds/002")
    flip(folder / "rounds/001/state.safetensors")
    with pytest.raises(RunFolderError, match=r"001/state.safetensors is missing or damaged"):
        RunFolder(folder).read_state(1)
    said = []
    train(configure(), folder, say=said.append)
    assert said == [f"round 1 in {folder} is damaged; going back to the beginning, the last point that is whole"]
    assert final_bytes(folder) == final_bytes(finished())


def test_damaged_tokens_are_made_again(configure, finished, copied, tmp_path, monkeypatch):
    folder = copied()
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    shutil.rmtree(folder / "rounds/002")
    setup = json.loads((folder / "setup.json").read_text())
    shutil.copytree(setup["tokens"], tmp_path / "home/cache" / setup["tokens"].rsplit("/", 1)[-1])
    setup["tokens"] = str(next((tmp_path / "home/cache").iterdir()))
    del setup["seal"]
    RunFolder(folder).write_json("setup.json", setup)
    for path in (tmp_path / "home/cache").rglob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    train(configure(), folder)
    assert final_bytes(folder) == final_bytes(finished())


# -- refusals


def test_another_configuration_in_the_same_folder_is_refused_and_says_what_differs(configure, finished):
    with pytest.raises(RunFolderError, match=r"lora.rank was 8, is 4; training.learning_rate was 0.005, is 0.01"):
        train(configure({"lora.rank": 4, "training.learning_rate": 0.01}), finished())


def test_what_does_not_change_the_numbers_may_differ(configure, copied):
    train(configure({"name": "another", "runner.retries": 5, "tracking.experiment": "else"}), copied())


def test_a_folder_with_something_else_is_refused(configure, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="is not empty and holds no run"):
        train(configure(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_seal_is_of_the_content_as_it_is_read_again(tmp_path):
    run = RunFolder(tmp_path)
    run.write_json("a.json", {10: (1, 2), 9: [0.1, 1e300, float("inf")], "ρ": {"é": None, 2: True}, "b": 2**70})
    seal = "ee5d29cbcf96c35a6a943498b96f5ee7"
    assert json.loads((tmp_path / "a.json").read_text())["seal"][:32] == seal
    assert run.read_json("a.json") == {
        "10": [1, 2],
        "9": [0.1, 1e300, float("inf")],
        "ρ": {"é": None, "2": True},
        "b": 2**70,
    }


class TestReadings:
    """Of what a server has at hand already."""

    @pytest.fixture
    def run(self, copied):
        folder = copied()
        for path in folder.glob("rounds/002/[rs]*"):
            path.unlink()
        return RunFolder(folder)

    def close(self, server) -> dict:
        """Round 2, when nothing is left of it to read but the record of the round before."""
        for path in [*server.run.path.glob("rounds/002/*.json"), server.run.path / "rounds/001/state.json"]:
            path.unlink()
        server.close(2, [], [], Timings())
        return server.run.need_json(server.run.record_name(2))["rows"]

    def test_what_it_has_made_is_not_read_again(self, run, finished):
        server = Server(run)
        server.receive(Ask(2, 0, (0, 1, 2)), {})
        server.aggregate(2)
        assert self.close(server) == RunFolder(finished()).need_json("rounds/002/record.json")["rows"]

    def test_after_a_restart_an_upload_is_read_and_hashed_once(self, run, finished, monkeypatch):
        Server(run).receive(Ask(2, 0, (0, 1, 2)), {})
        real, hashed = RunFolder.digest_of, []
        monkeypatch.setattr(RunFolder, "digest_of", lambda self, name: hashed.append(name) or real(self, name))
        server = Server(run)
        server.aggregate(2)
        assert sorted(name for name in hashed if "client" in name) == [
            f"rounds/002/client-00{client}.safetensors" for client in range(3)
        ]
        for path in run.path.glob("rounds/002/client-*"):
            path.unlink()
        assert self.close(server) == RunFolder(finished()).need_json("rounds/002/record.json")["rows"]
