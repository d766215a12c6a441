"""Every file of a run damaged in turn: it is noticed, the run goes back as little as it must, and ends the same."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from fedlora import metrics
from fedlora.errors import DataError, RunFolderError
from fedlora.run import recovery, rounds
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder

CHANGES = {"rounds": 3, "training.local_steps": 1, "evaluation.local": False}


def final_bytes(folder) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def without_times(folder) -> list[dict]:
    records = rounds.records(RunFolder(folder))
    return [metrics.reproducible(record.metrics) for record in records]


@pytest.fixture(scope="module")
def whole(finished):
    return finished(CHANGES)


@pytest.fixture
def interrupted(whole, tmp_path):
    """A copy of a run of three rounds as it was when the clients of the last one had been received."""
    folder = shutil.copytree(whole, tmp_path / "run")
    for name in ("rounds/003/state.json", "rounds/003/state.safetensors", "rounds/003/record.json"):
        (folder / name).unlink()
    for name in ("adapter", "tables"):
        shutil.rmtree(folder / name)
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {"flipped": flip, "truncated": truncate, "deleted": os.unlink}
BACK = {  # what is said of a damaged file; nothing where it is simply made again
    "partition.json": "the data is dealt again",
    "partition.npz": "the data is dealt again",
    "rounds/000/record.json": "going back to the beginning",
    "rounds/000/state.json": "",
    "rounds/001/record.json": "round 1 in .* is damaged; going back to the beginning",
    "rounds/001/state.json": "",
    "rounds/002/record.json": "round 2 in .* is damaged; going back to round 1",
    "rounds/002/state.json": "round 2 in .* is damaged; going back to round 1",
    "rounds/002/state.safetensors": "round 2 in .* is damaged; going back to round 1",
    "rounds/003/roll.json": "the roll of round 3",
    "rounds/003/client-001.json": "the update of client 1 of round 3",
    "rounds/003/client-001.safetensors": "the update of client 1 of round 3",
    "run.json": "",
    "config.yaml": "",
    "setup.json": "",
    "adapter_config.json": "",
    "figures/partition.png": "",
}


ONE_OF_EACH = {
    ("partition.json", "flipped"),
    ("partition.npz", "truncated"),
    ("rounds/000/record.json", "deleted"),
    ("rounds/000/state.json", "flipped"),
    ("rounds/001/record.json", "truncated"),
    ("rounds/002/record.json", "flipped"),
    ("rounds/002/state.json", "truncated"),
    ("rounds/002/state.safetensors", "deleted"),
    ("rounds/003/roll.json", "flipped"),
    ("rounds/003/roll.json", "deleted"),
    ("rounds/003/client-001.json", "flipped"),
    ("rounds/003/client-001.safetensors", "truncated"),
    ("run.json", "truncated"),
    ("config.yaml", "deleted"),
    ("setup.json", "flipped"),
    ("adapter_config.json", "truncated"),
    ("figures/partition.png", "deleted"),
}
"""Of what is noticed and mended in the same way; all others are `make test-system`."""
CASES = [
    pytest.param(name, kind, marks=[] if (name, kind) in ONE_OF_EACH else pytest.mark.system)
    for name in BACK
    for kind in DAMAGE
    if (name, kind) != ("run.json", "deleted") and (kind == "deleted" or not name.endswith("png"))
]
"""Without `run.json` it is a folder of an older version; and a picture is for people."""


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_damaged_file(configure, interrupted, whole, name, kind):
    DAMAGE[kind](interrupted / name)
    said = []
    train(configure(CHANGES), interrupted, say=said.append)
    if BACK[name] and not (kind == "deleted" and name in ("rounds/003/roll.json", "rounds/000/record.json")):
        assert len(said) == 1, said
        assert re.search(BACK[name], said[0])
    assert final_bytes(interrupted) == final_bytes(whole)
    assert without_times(interrupted) == without_times(whole)


def test_a_whole_run_is_left_alone(interrupted):
    run = RunFolder(interrupted)
    before = {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")}
    assert recovery.mend(run) == []
    assert {path: path.stat().st_mtime_ns for path in interrupted.rglob("*")} == before


def test_nobody_trains_again_whose_update_is_whole(configure, interrupted):
    flip(interrupted / "rounds/002/state.safetensors")
    uploads = sorted((interrupted / "rounds/002").glob("client-*"))
    before = [path.stat().st_mtime_ns for path in uploads]
    train(configure(CHANGES), interrupted)
    assert [path.stat().st_mtime_ns for path in uploads] == before


def test_unfinished_files_are_removed(configure, interrupted):
    left = interrupted / "rounds/003/.state.json.4711.tmp"
    left.write_text("{")
    recovery.mend(RunFolder(interrupted))
    assert not left.exists()


def test_data_that_is_not_what_the_run_began_with_is_refused(configure, tmp_path, monkeypatch):
    import pandas as pd

    table = pd.DataFrame({"text": [f"text {i} of {i % 2}" for i in range(80)], "label": ["a", "b"] * 40})
    table.to_csv(tmp_path / "data.csv", index=False)
    config = configure({"data.name": str(tmp_path / "data.csv"), "data.train_size": None, "rounds": 1})
    train(config, tmp_path / "run")
    table.assign(text="other").to_csv(tmp_path / "data.csv", index=False)
    truncate(tmp_path / "run/partition.npz")
    (tmp_path / "run/setup.json").unlink()
    with pytest.raises(DataError, match=r"is not the one that the run in .* began with .*restore the data"):
        train(config, tmp_path / "run")


class TestRetention:
    @pytest.fixture(scope="class")
    def pruned(self, finished):
        return finished({**CHANGES, "keep_rounds": 1})

    def test_only_the_last_rounds_and_the_start_keep_their_tensors(self, pruned):
        files = {str(path.relative_to(pruned)) for path in (pruned / "rounds").rglob("*.safetensors")}
        assert {name.split("/")[1] for name in files} == {"000", "003"}
        for number in (1, 2):
            assert [path.name for path in (pruned / f"rounds/{number:03d}").iterdir()] == ["record.json"]

    def test_results_and_tables_are_the_same(self, pruned, whole):
        assert final_bytes(pruned) == final_bytes(whole)
        assert without_times(pruned) == without_times(whole)
        for name in ("divergence", "clients"):
            mine, theirs = (json.loads((folder / f"tables/{name}.json").read_text()) for folder in (pruned, whole))
            assert [{**row, "seconds": 0} for row in mine] == [{**row, "seconds": 0} for row in theirs]

    def test_a_damaged_run_goes_back_as_far_as_it_must(self, configure, pruned, whole, tmp_path):
        folder = shutil.copytree(pruned, tmp_path / "run")
        flip(folder / "rounds/003/state.safetensors")
        said = []
        train(configure({**CHANGES, "keep_rounds": 1}), folder, say=said.append)
        assert "going back to the beginning" in said[0]
        assert final_bytes(folder) == final_bytes(whole)

    def test_the_size_is_that_of_the_files(self, pruned, whole):
        assert 0 < recovery.size(RunFolder(pruned)) < recovery.size(RunFolder(whole))


class TestFolders:
    def test_of_an_older_version(self, configure, interrupted):
        (interrupted / "run.json").unlink()
        for call in (lambda: train(configure(CHANGES), interrupted), lambda: RunFolder.open(interrupted)):
            with pytest.raises(RunFolderError, match=r"was made by an older version of fedlora.*it has no run.json"):
                call()

    def test_of_another_layout(self, configure, interrupted):
        run = RunFolder(interrupted)
        run.write_json("run.json", {**run.read_json("run.json"), "format": 99})
        with pytest.raises(
            RunFolderError, match=r"has layout 99 of fedlora \S+, and this version \(\S+\) continues layout 3"
        ):
            RunFolder.open(interrupted)

    def test_whose_configuration_was_edited(self, interrupted):
        path = interrupted / "config.yaml"
        path.write_text(path.read_text().replace("rounds: 3\n", "rounds: 30\n", 1))
        with pytest.raises(RunFolderError, match=r"another configuration \(rounds was 3, is 30\)"):
            RunFolder.open(interrupted)

    def test_whose_descriptions_are_both_damaged(self, interrupted):
        truncate(interrupted / "run.json")
        (interrupted / "config.yaml").write_text("rounds: [")
        with pytest.raises(RunFolderError, match=r"run.json and config.yaml are both damaged"):
            RunFolder.open(interrupted)

    def test_opened_with_one_of_them_damaged_have_both_again(self, interrupted):
        config, identity = (interrupted / "config.yaml").read_bytes(), RunFolder(interrupted).id
        flip(interrupted / "config.yaml")
        (interrupted / "config.yaml").write_text("rounds: [")
        assert RunFolder.open(interrupted).id == identity
        assert (interrupted / "config.yaml").read_bytes() == config
        truncate(interrupted / "run.json")
        assert RunFolder.open(interrupted).config.rounds == 3
        assert RunFolder(interrupted).read_json("run.json")

    def test_that_hold_no_run(self, tmp_path):
        with pytest.raises(RunFolderError, match="holds no run"):
            RunFolder.open(tmp_path)

    def test_begun_with_other_packages_say_so(self, configure, interrupted):
        run = RunFolder(interrupted)
        known = run.read_json("run.json")
        run.write_json("run.json", {**known, "versions": {**known["versions"], "torch": "1.0"}})
        assert [line for line in recovery.mend(run) if "torch was 1.0, is 2" in line and "may differ" in line]


class TestLock:
    def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(self, configure, interrupted):
        code = (
            "import sys, time; from pathlib import Path; from fedlora.run.runfolder import RunFolder\n"
            f"with RunFolder(Path({str(interrupted)!r})).held():\n"
            " print('held', flush=True); time.sleep(600)"
        )
        holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        try:
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(
                RunFolderError, match=rf"is under way \(process {holder.pid}\); wait until it has ended"
            ):
                train(configure(CHANGES), interrupted)
        finally:
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
            holder.stdout.close()
        train(configure(CHANGES), interrupted)

    def test_a_folder_that_cannot_be_locked_says_why(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(RunFolderError, match="cannot write"), RunFolder(tmp_path / "file" / "run").held():
            pass
