"""Folders kept in a store elsewhere: on a second root of this disk, and in a test server of S3's protocol (moto)."""

import json
import os
import threading
import time

import pytest

from fedlora.errors import ConfigError, RunFolderError
from fedlora.files import remote
from fedlora.files.remote import Remote


@pytest.fixture(scope="module")
def s3():
    """The address of a bucket on moto's server, which is a test server and no store to keep anything in."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        import fsspec

        fsspec.filesystem("s3").mkdir("runs")
        yield "s3://runs"
    server.stop()


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path, monkeypatch):
    """Of a folder that is not there yet."""
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remote, "_SETTLE_S", 0.0)
    root = request.getfixturevalue("s3") if request.param == "s3" else f"file://{tmp_path}/elsewhere"
    return f"{root}/{tmp_path.name}"


@pytest.fixture
def moved(monkeypatch, tmp_path):
    """`moved()`: this is another machine now, with a home of its own."""

    def move(name="other"):
        monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / name))
        monkeypatch.setattr(remote.socket, "gethostname", lambda: name)

    return move


def fill(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def held(url):
    """What another machine would find."""
    return {name: content for name, content in _all(Remote(url)).items() if name not in ("files.json", "lease.json")}


def _all(there):
    found = there._store.find(there._root)
    return {path.removeprefix(there._root).lstrip("/"): there._store.cat_file(path).decode() for path in found}


def test_what_is_worked_on_is_kept_there_and_found_by_another_machine(url, moved):
    with Remote(url).worked_on() as folder:
        fill(folder, a="1", rounds__000__record="2", lock="mine", **{".hidden": "3"})
    assert held(url) == {"a": "1", "rounds/000/record": "2"}
    moved()
    with Remote(url).worked_on() as folder:
        assert (folder / "rounds" / "000" / "record").read_text() == "2"
        (folder / "a").unlink()
        fill(folder, b="4")
    assert held(url) == {"rounds/000/record": "2", "b": "4"}
    assert "lease.json" not in _all(Remote(url))


def test_only_what_has_changed_is_written(url):
    there = Remote(url)
    with there.worked_on() as folder:
        fill(folder, a="1", b="2")
        assert there.push(folder) == 2
        fill(folder, b="changed")
        assert there.push(folder) == 1
        assert there.push(folder) == 0


def test_tensors_are_there_before_the_json_that_names_them_and_the_end_of_a_round_last(url, monkeypatch):
    there, order = Remote(url), []
    write = there._write
    monkeypatch.setattr(there, "_write", lambda folder, names, now: (order.append(names), write(folder, names, now)))
    with there.worked_on() as folder:
        fill(folder, **{"r__record.json": "{}", "r__state.json": "{}", "r__state.safetensors": "x", "config.yaml": ""})
        there.push(folder)
    assert order == [["config.yaml", "r/state.safetensors"], ["r/state.json"], ["r/record.json"]]


def test_a_copy_that_is_ahead_is_gone_on_with(url):
    """As after a kill between two writes: the store holds less, and nothing else."""
    there = Remote(url)
    with there.worked_on() as folder:
        fill(folder, a="1", b="2")
        there.push(folder)
    fill(folder, a="later", c="3")
    with Remote(url).worked_on() as again:
        assert {path.name: path.read_text() for path in again.iterdir() if path.name in "abc"} == {
            "a": "later",
            "b": "2",
            "c": "3",
        }
    assert held(url) == {"a": "later", "b": "2", "c": "3"}


def test_a_copy_that_has_been_overtaken_is_made_like_the_store_first(url, moved, monkeypatch, tmp_path):
    with Remote(url).worked_on() as folder:
        fill(folder, a="1", b="2")
    fill(folder, c="never written")
    moved()
    with Remote(url).worked_on() as other:
        fill(other, a="newer")
        (other / "b").unlink()
    moved("home")
    with Remote(url).worked_on() as folder:
        assert sorted(path.name for path in folder.iterdir() if path.name in "abc") == ["a"]
        assert (folder / "a").read_text() == "newer"


def test_files_that_no_record_lists_do_not_count(url, moved):
    there = Remote(url)
    with there.worked_on() as folder:
        fill(folder, a="1")
    there._store.pipe_file(f"{there._root}/half", b"written, and then killed")
    moved()
    assert not (Remote(url).fetched() / "half").exists()


def test_who_is_at_work_keeps_others_away_until_the_lease_runs_out(url, moved, monkeypatch):
    first = Remote(url)
    first.take()
    moved()
    with pytest.raises(RunFolderError, match=r"is under way \(.*, whose lease ends at \d\d:\d\d:\d\d unless"):
        Remote(url).take()
    later = time.time() + remote.LEASE_S + 1
    monkeypatch.setattr(remote.time, "time", lambda: later)
    second = Remote(url)
    second.take()
    with pytest.raises(RunFolderError, match="was taken by other:"):
        first._see_that_it_is_ours()
    first.release()  # which is not its own any more
    assert json.loads(_all(second)["lease.json"])["token"] == second._token


def test_a_process_of_this_machine_that_was_killed_has_no_lease(url):
    there = Remote(url)
    there.take()
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    lease = json.loads(_all(there)["lease.json"])
    gone = {**lease, "holder": f"{lease['holder'].rpartition(':')[0]}:{child}"}
    there._store.pipe_file(f"{there._root}/lease.json", json.dumps(gone).encode())
    Remote(url).take()


def test_whose_lease_was_taken_writes_nothing_more(url, moved, monkeypatch):
    there = Remote(url)

    def work():
        with there.worked_on() as folder:
            fill(folder, a="1")
            there.push(folder)
            there._store.pipe_file(f"{there._root}/lease.json", json.dumps({"holder": "b:1", "token": "b"}).encode())
            fill(folder, a="2")

    with pytest.raises(RunFolderError, match="was taken by"):
        work()
    assert held(url)["a"] == "1"
    assert "b:1" in _all(there)["lease.json"]


@pytest.mark.parametrize("url", ["file"], indirect=True)
def test_a_store_that_is_away_is_waited_for_and_the_copy_is_whole(url, monkeypatch):
    said, told, there = [], threading.Event(), Remote(url)
    monkeypatch.setattr(remote, "_PUSH_S", 0.01)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    really = there._store.pipe_file

    def away(*args):
        raise OSError("no route to host")

    with there.worked_on(lambda line: (said.append(line), told.set())) as folder:
        monkeypatch.setattr(there._store, "pipe_file", away)
        fill(folder, a="1")
        there.commit(folder)  # a run goes on
        told.wait(30)
        assert "no route to host" in said[0]
        assert "The run goes on in its copy" in said[0]
        monkeypatch.setattr(there._store, "pipe_file", really)
    assert held(url) == {"a": "1"}


@pytest.mark.parametrize("url", ["file"], indirect=True)
def test_a_copy_that_could_not_be_fetched_whole_changes_nothing_in_the_store(url, moved):
    with Remote(url).worked_on() as folder:
        fill(folder, a="1", b="2")
    before = held(url)
    moved()
    there = Remote(url)
    there._store.cat = lambda paths, on_error: {path: OSError("reset by peer") for path in paths}
    with pytest.raises(RunFolderError, match="cannot be used: reset by peer"), there.worked_on():
        pass
    del there._store.cat
    assert held(url) == before
    assert json.loads(_all(there)["files.json"])["files"].keys() == {"a", "b"}


def test_a_place_of_an_unknown_kind():
    with pytest.raises(ConfigError, match="nonsense://x is no place to keep a folder: Protocol not known"):
        Remote("nonsense://x")


def test_a_url_with_a_password_is_refused_without_saying_it():
    with pytest.raises(ConfigError, match="ftp://… holds a password") as refused:
        Remote("ftp://me:hunter2@host/run")
    assert "hunter2" not in str(refused.value)


def test_no_credentials(s3, monkeypatch, tmp_path):
    import fsspec

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(RunFolderError, match="needs credentials, and there are none; set AWS_ACCESS_KEY_ID"):
        Remote("s3://runs/x").fetched()
    fsspec.filesystem("s3").clear_instance_cache()
