"""Sets of files by their digests, and the bounded cache of them."""

import os

import pytest

from fedlora.errors import DataError
from fedlora.files import filesets
from fedlora.files.filesets import Cache, File, FileSet


@pytest.fixture
def described(tmp_path):
    """`described("a", size)`: a set of one file of that many bytes."""

    def make(name, size=1000):
        folder = tmp_path / "source" / name
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_bytes(os.urandom(size))
        return filesets.described(folder, ["inner/file"])

    return make


def fetch_of(wanted, asked=None):
    def fetch(file):
        if asked is not None:
            asked.append(file.name)
        return filesets.chunks(filesets.Path(wanted.folder) / file.name)

    return fetch


def test_a_set_is_fetched_once_and_whole(tmp_path, described):
    wanted, asked, cache = described("a"), [], Cache(tmp_path / "cache", 10**6)
    for _ in range(2):
        place = cache.have(wanted, fetch_of(wanted, asked))
    assert asked == ["inner/file"]
    assert (place / "inner" / "file").read_bytes() == (filesets.Path(wanted.folder) / "inner" / "file").read_bytes()


def test_of_too_many_bytes_the_set_that_was_not_asked_for_the_longest_goes(tmp_path, described):
    cache = Cache(tmp_path / "cache", 2500)
    first, second, third = (described(name) for name in "abc")
    for age, wanted in enumerate((first, second)):
        os.utime(cache.have(wanted, fetch_of(wanted)), (age, age))
    cache.have(first, fetch_of(first))  # asked for again
    cache.have(third, fetch_of(third))
    assert [cache.has(wanted) for wanted in (first, second, third)] == [True, False, True]


def test_a_set_beyond_the_bound_is_had_all_the_same(tmp_path, described):
    cache, small, large = Cache(tmp_path / "cache", 500), described("a", 100), described("b", 1000)
    cache.have(small, fetch_of(small))
    cache.have(large, fetch_of(large))
    assert [cache.has(wanted) for wanted in (small, large)] == [False, True]


def test_what_was_fetched_must_be_what_was_described(tmp_path, described):
    wanted, cache = described("a"), Cache(tmp_path / "cache", 10**6)
    with pytest.raises(DataError, match=r"inner/file was fetched and is not what was described \(5 bytes, expected"):
        cache.have(wanted, lambda file: [b"other"])
    assert not cache.has(wanted)
    cache.have(wanted, fetch_of(wanted))  # nothing of it is left in the way


@pytest.mark.parametrize("name", ["../outside", "/absolute", ""])
def test_a_file_stays_in_its_set(tmp_path, name):
    wanted = FileSet("anywhere", (File(name, "0" * 64, 1),))
    with pytest.raises(DataError, match="no place within it"):
        Cache(tmp_path / "cache", 10**6).have(wanted, lambda file: [b"x"])


def test_the_very_same_files_are_seen_and_others_of_the_same_size_are_not(described):
    wanted = described("a")
    assert wanted.seen()
    path = filesets.Path(wanted.folder) / "inner" / "file"
    path.write_bytes(bytes(1000))
    assert not wanted.seen()
    path.unlink()
    assert not wanted.seen()
