"""Runs whose folder is kept at a URL: killed in one place, gone on with in another, to the same bits."""

import time

import pytest

from deployments.shipped import PRESETS
from fedlora.config import configfile
from fedlora.files import remote
from fedlora.files.remote import Remote
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder
from fedlora.run.server import Server


class Killed(BaseException):
    """Nothing is said or written any more."""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The URL of a run folder on a second root, seen from a home of its own."""
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "_SETTLE_S", 0.0)
    return f"file://{tmp_path}/elsewhere/run"


def states(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.glob("rounds/*/state.safetensors")}


def test_a_run_that_was_killed_is_gone_on_with_on_another_machine(elsewhere, run_flow, tiny, tmp_path, monkeypatch):
    aggregate = Server.aggregate

    def killed(self, number):
        if number == 2:
            monkeypatch.setattr(Remote, "_push_at_last", lambda self, folder: None)
            monkeypatch.setattr(Remote, "release", lambda self: None)
            raise Killed
        return aggregate(self, number)

    monkeypatch.setattr(Server, "aggregate", killed)
    with pytest.raises(BaseException):  # noqa: B017, PT011 (as Prefect makes of it)
        run_flow({}, run_dir=elsewhere)
    monkeypatch.undo()
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(remote.socket, "gethostname", lambda: "other")
    later = time.time() + remote.LEASE_S + 1
    monkeypatch.setattr(remote.time, "time", lambda: later)
    run_flow({}, run_dir=elsewhere)
    train(configfile.load("demo", tiny, PRESETS), tmp_path / "here")
    kept = RunFolder(tmp_path / "elsewhere" / "run")
    assert states(kept.path) == states(tmp_path / "here")
    assert (kept.path / "adapter" / "adapter_model.safetensors").is_file()
    assert kept.finished_rounds() == [0, 1, 2]
