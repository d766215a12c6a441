"""What a round may cost, in counts that no machine changes: passes through the model, loads of the base, files, waits
for the disk, bytes."""

import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
from transformers import BertModel

from fedlora.model.resident import ResidentModel
from fedlora.run import rounds
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder

CLIENTS, STEPS = 6, 2


@pytest.fixture(scope="module")
def counted(tiny, tmp_path_factory):
    """The counts of each round of a run of six clients, and its folder; 0 is the evaluation before training."""
    from fedlora.config import configfile

    seen, by_round = Counter(), []
    patch = pytest.MonkeyPatch()

    def count(owner, name, as_what, when=lambda *a, **k: True):
        real = getattr(owner, name)

        def counting(*arguments, **named):
            seen[as_what] += when(*arguments, **named)
            return real(*arguments, **named)

        patch.setattr(owner, name, counting)

    count(BertModel, "forward", "passes")
    count(os, "fsync", "waits")
    count(Path, "replace", "files", lambda path, target: path.suffix == ".tmp")
    build = ResidentModel.build.__func__
    patch.setattr(ResidentModel, "build", classmethod(lambda cls, *a: (seen.update(["loads"]), build(cls, *a))[1]))

    def closed(record):
        by_round.append(dict(seen))
        seen.clear()

    changes = {
        "clients": CLIENTS,
        "partition.name": "iid",
        "training.local_steps": STEPS,
        "rounds": 3,
        "keep_rounds": None,
    }
    path = tmp_path_factory.mktemp("counts") / "run"
    try:
        train(configfile.build({**tiny, **changes}), path, report=closed)
    finally:
        patch.undo()
    return by_round, RunFolder.open(path)


def batches(examples, config):
    return math.ceil(examples / config.evaluation.batch_size)


def test_each_example_passes_as_often_as_it_must(counted):
    by_round, run = counted
    tested = json.loads((run.path / "setup.json").read_text())["examples"]["test"]
    shares = [len(rows) for rows in rounds.Partition.load(run.path / "partition.npz").test]
    own = sum(batches(share, run.config) for share in shares if share)
    whole = batches(tested, run.config)
    assert by_round[0]["passes"] == whole + own
    assert all(counts["passes"] == CLIENTS * STEPS + own + whole for counts in by_round[1:])


def test_the_base_is_loaded_once(counted):
    assert [counts.get("loads", 0) for counts in counted[0]] == [1, 0, 0, 0]


def test_a_client_leaves_two_files_and_a_round_four(counted):
    for counts in counted[0][1:3]:  # the last round is followed by the adapter, tables and figures
        assert counts["files"] == 2 * CLIENTS + 4  # roll, state with its tensors, record


def test_the_disk_is_waited_for_as_often_whatever_the_clients(counted):
    for counts in counted[0][1:3]:
        assert counts["waits"] == 4


def test_what_a_client_sends_is_its_adapter_and_little_more(counted):
    _, run = counted
    for number in (1, 2, 3):
        record = rounds.read_record(run, number)
        up = record.metrics["bytes/up_adapter"] + record.metrics["bytes/up_head"]
        sent = sum(file.stat().st_size for file in run.round_folder(number).glob("client-*.safetensors"))
        assert sent == pytest.approx(up, rel=0.01)  # counted as two files, sent as one
