"""A disk that fills up in the middle of a run: one clear line, nothing spoilt, and the run goes on afterwards."""

import errno
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest

from fedlora.errors import RunFolderError
from fedlora.files.atomic import write_atomic
from fedlora.run.loop import train

NO_SPACE = r"^no space left while saving \S+; what was saved before is intact\. Free some space, then .* to continue\.$"


def contents(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_like_uninterrupted(folder, finished) -> None:
    mine, theirs = contents(folder), contents(finished())
    assert mine.keys() == theirs.keys()
    for path in theirs:
        if path.suffix == ".safetensors" or path.name in ("divergence.json", "partition.json", "partition.npz"):
            assert mine[path] == theirs[path], path


@pytest.fixture
def full_at(monkeypatch):
    """A function: let the disk be full at this file written from now on, a number or a name (None: never)."""
    state = {"at": None, "written": 0}
    real = Path.replace

    def replace(path, target):  # ".state.json.4711.tmp"
        written = path.suffix == ".tmp"
        state["written"] += written
        if written and (state["at"] == state["written"] or path.name.startswith(f".{state['at']}.")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    return lambda at: state.update(at=at, written=0)


def test_what_was_there_stays_when_a_file_cannot_be_replaced(tmp_path, full_at):
    path = tmp_path / "folder" / "file"
    write_atomic(path, b"first")
    full_at(1)
    with pytest.raises(RunFolderError, match=NO_SPACE):
        write_atomic(path, b"second")
    assert contents(tmp_path) == {path.relative_to(tmp_path): b"first"}
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS])
def test_every_refusal_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, code):
    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    with pytest.raises(RunFolderError, match=NO_SPACE if full else r"^cannot write .*\. Choose another --run-dir\.$"):
        write_atomic(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def meets_a_full_disk(config, folder) -> str:
    """The file for which there was no space; nothing is left of it, and what was there before is as it was."""
    before = contents(folder)
    with pytest.raises(RunFolderError, match=NO_SPACE) as refused:
        train(config, folder)
    after = contents(folder)
    assert not [path for path in after if path.suffix == ".tmp"]
    assert {path: after[path] for path in before} == before
    return str(refused.value).split(";")[0].rsplit("/", 1)[-1]


MOMENTS = ("config.yaml", "setup.json", "state.json", "client-001.safetensors", "adapter_model.safetensors")


def test_a_run_that_meets_a_full_disk_at_every_stage_ends_like_any_other(configure, finished, tmp_path, full_at):
    for name in MOMENTS:
        full_at(name)
        assert meets_a_full_disk(configure(), tmp_path / "run") == name
    full_at(None)
    train(configure(), tmp_path / "run")
    assert_like_uninterrupted(tmp_path / "run", finished)


@pytest.mark.system
def test_a_run_that_meets_a_full_disk_again_and_again_ends_like_any_other(configure, finished, tmp_path, full_at):
    """Each attempt may write no more files than it needs to get further than the one before."""
    folder, failures, allowed = tmp_path / "run", [], 1
    for _ in range(100):
        full_at(allowed)
        try:
            failures.append(meets_a_full_disk(configure(), folder))
        except pytest.fail.Exception:  # it did not: the run is complete
            break
        allowed += failures[-1:] == failures[-2:-1]
    full_at(None)
    kinds = {re.sub(r"-\d+", "", name) for name in failures}
    assert kinds >= {"config.yaml", "setup.json", "client.safetensors", "state.json", "adapter_model.safetensors"}
    assert_like_uninterrupted(folder, finished)


@pytest.fixture
def small_disk(tmp_path):
    """`resize(bytes)`, and a folder on a disk of its own of that size; where none can be mounted, files are limited."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, check=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def resize(size):
        if mounted.returncode == 0:
            options = f"remount,size={size}"
            subprocess.run(["mount", "-o", options, str(folder)], capture_output=True, check=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 16 if size < 10**6 else soft, hard))

    yield resize, folder
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize("kilobytes", [*(pytest.param(size, marks=pytest.mark.system) for size in (60, 500)), 260, 600])
def test_a_run_on_a_disk_that_is_too_small(pictures, configure, finished, small_disk, kilobytes):
    resize, disk = small_disk
    resize(kilobytes * 1024)
    with pytest.raises(RunFolderError, match=NO_SPACE):
        train(configure(), disk / "run")
    before = contents(disk / "run")
    assert before
    assert not [path for path in before if path.suffix == ".tmp"]
    resize(8 * 1024**2)
    train(configure(), disk / "run")
    assert_like_uninterrupted(disk / "run", finished)
