"""A sweep's state on disk: which execution is continued, and what is kept of it."""

import pytest

from deployments.shipped import PRESETS, SWEEPS
from fedlora.errors import RunFolderError
from fedlora.files import lock
from fedlora.sweep import plan as sweeps
from fedlora.sweep.folder import SweepFolder


@pytest.fixture
def plan(tmp_path):
    """`plan([0, 1])`: a sweep over seeds."""

    def make(seeds=(0, 1), rounds=2):
        file = tmp_path / "mine.yaml"
        left_out = "skip: [{seed: 1, reason: no}]\n" if len(seeds) > 1 else ""
        file.write_text(f"name: mine\nset: {{rounds: {rounds}}}\ngrid: {{seed: {list(seeds)}}}\n{left_out}")
        return sweeps.load(str(file), None, PRESETS, SWEEPS)

    return make


def begun(root, plan, flow_run="f1", **how):
    folder = SweepFolder.choose(root, plan, flow_run=flow_run, **how)
    folder.begin(plan, flow_run, how.get("retry", False))
    folder.save(plan)
    return folder


def test_what_is_written_is_read_back(plan, tmp_path):
    folder = begun(tmp_path / "sweeps", plan([0, 1, 2]))
    folder.parent = {"uri": "sqlite:///x", "experiment": "1", "run": "abc"}
    folder.mark(plan([0, 1, 2]).cells[0].digest, "failed", "no memory")
    folder.save(plan([0, 1, 2]))
    found = SweepFolder.read(folder.path)
    assert found == folder
    assert [cell.status for cell in found.cells] == ["failed", "waiting", "skipped"]
    assert [cell.label for cell in found.having("skipped")] == ["seed=1"]
    assert found.having("failed")[0].reason == "no memory"


def test_the_latest_execution_goes_on_and_a_grown_grid_adds_to_it(plan, tmp_path):
    first = begun(tmp_path, plan([0]))
    first.mark(first.cells[0].digest, "finished", run="r0")
    first.save(plan([0]))
    again = begun(tmp_path, plan([0, 1, 2]), "f2")
    assert again.path == first.path
    assert [(cell.status, cell.run) for cell in again.cells] == [
        ("finished", "r0"),
        ("waiting", None),
        ("skipped", None),
    ]
    assert again.flow_runs == ["f1", "f2"]


def test_fresh_begins_anew_except_for_a_retry_of_the_same_flow_run(plan, tmp_path):
    first = begun(tmp_path, plan())
    second = begun(tmp_path, plan(), "f2", fresh=True)
    assert second.path != first.path
    assert begun(tmp_path, plan(), "f2", fresh=True).path == second.path
    assert begun(tmp_path, plan(), "f3").path == second.path  # the latest
    assert SweepFolder.latest(tmp_path, plan()).path == second.path
    assert SweepFolder.latest(tmp_path, plan(rounds=5)) is None


def test_failures_are_forgotten_on_demand_only(plan, tmp_path):
    folder = begun(tmp_path, plan())
    folder.mark(folder.cells[0].digest, "failed", "no memory")
    folder.begin(plan(), "f2", forget_failures=False)
    assert folder.cells[0].status == "failed"
    folder.begin(plan(), "f3", forget_failures=True)
    assert (folder.cells[0].status, folder.cells[0].reason) == ("waiting", None)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cells": [1], "flow_runs": [], "parent": null}'])
def test_a_damaged_state_is_no_state(plan, tmp_path, content):
    folder = begun(tmp_path, plan())
    (folder.path / "sweep.json").write_text(content)
    assert SweepFolder.read(folder.path) is None
    assert SweepFolder.choose(tmp_path, plan()).path != folder.path


def test_a_second_process_is_refused_while_the_first_holds_the_folder(tmp_path):
    with (
        lock.held(tmp_path / "run", "the run", "wait for it"),
        pytest.raises(RunFolderError, match=r"the run is under way \(process \d+\); wait for it"),
        lock.held(tmp_path / "run", "the run", "wait for it"),
    ):
        pass
    with lock.held(tmp_path / "run", "the run", "wait for it"):
        pass


def test_the_one_before_is_the_last_that_came_to_its_end(plan, tmp_path):
    """Neither one that was interrupted, nor one without a finished run, nor another plan's."""
    ends = {"20260101-020000": "finished", "20260102-020000": "failed", "20260103-020000": "waiting"}
    identity = plan([0]).identity
    for stamp, status in ends.items():
        folder = SweepFolder(tmp_path / f"mine-{identity}-{stamp}")
        folder.path.mkdir()
        folder.begin(plan([0]), "", False)
        folder.mark(folder.cells[0].digest, status, run="r")
        folder.save(plan([0]))
    other = SweepFolder(tmp_path / f"mine-{plan([0], rounds=3).identity}-20260101-020000")
    other.path.mkdir()
    tonight = SweepFolder(tmp_path / f"mine-{identity}-20260104-020000")
    assert tonight.before().instance == f"mine-{identity}-20260101-020000"
    assert tonight.before().before() is None
    assert SweepFolder(tmp_path / f"mine-{identity}-20260101-020000-2").before() == tonight.before()
