"""Files from anyone: of what size, of what kind, and where they may be."""

import json
import os

import pytest

from fedlora.adapter.base_update import FILE, BaseUpdate
from fedlora.errors import AdapterError
from fedlora.exchange.description import description
from fedlora.files.limits import clean, file_within, read_json, read_text, short


class TestJson:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "Expecting property name"),
            ('{"a": 1, "a": 2}', "key 'a' is there twice"),
            ("[" * 31 + "]" * 31, "nested deeper than 30 levels"),
            ('{"a":' * 200_000, "nested deeper than 30 levels"),
            ("9" * 5000, "digits"),
        ],
    )
    def test_is_refused(self, tmp_path, text, said):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_json(tmp_path / "a.json")

    def test_of_thirty_levels(self, tmp_path):
        (tmp_path / "a.json").write_text("[" * 30 + "]" * 30)
        assert read_json(tmp_path / "a.json")

    def test_size(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps("x" * 100))
        with pytest.raises(OSError, match="more than 50 bytes"):
            read_json(tmp_path / "a.json", 50)

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
    def test_what_is_no_file(self, tmp_path, make):
        make(tmp_path / "a.json")
        with pytest.raises(OSError, match="not a file"):
            read_text(tmp_path / "a.json", 99)


class TestFileWithin:
    def test_links(self, tmp_path):
        (tmp_path / "in" / "deep").mkdir(parents=True)
        (tmp_path / "secret").write_text("s")
        for name, target in (("same", "deep/x"), ("up", "../secret"), ("far", "/etc/passwd"), ("circle", "circle")):
            (tmp_path / "in" / name).symlink_to(target)
        folder = tmp_path / "in"
        assert file_within(folder, "same") == folder / "same"
        assert file_within(folder, "not there") == folder / "not there"
        for name in ("up", "far"):
            with pytest.raises(OSError, match="a link that leads out of the folder"):
                file_within(folder, name)
        with pytest.raises(OSError, match=r"[Ll]oop|links"):
            read_text(file_within(folder, "circle"), 9)

    def test_the_folder_itself_may_be_a_link(self, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "link").symlink_to("in")
        assert file_within(tmp_path / "link", "a") == tmp_path / "link" / "a"


def test_text_for_messages_is_one_printable_line():
    assert clean("a\nb\x1b[2J") == "a b [2J"
    assert short("x" * 99, 10) == "'xxxxxxxxx …"
    assert short("\ud800\u202e") == r"'\ud800\u202e'"
    assert short([1, "a"]) == "[1, 'a']"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/proc/self/environ", path)])
def test_a_base_update_that_is_no_file_of_the_folder(tmp_path, make):
    make(tmp_path / FILE)
    with pytest.raises(AdapterError, match=r"not a file|leads out of the folder"):
        BaseUpdate.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["null", "[]", "3", '{"model": {}}', '{"model": {}, "labels": []}', '{"model": {}, "labels": [1]}', '{"model": 3}',
     '{"model": {"name": 3, "x": 1}, "labels": ["a"]}', "[" * 100_000, '{"labels": ["a"]}', "\xff"],
)  # fmt: skip
def test_a_description_of_something_else(tmp_path, content):
    (tmp_path / "fedlora.json").write_text(content, encoding="latin-1")
    with pytest.raises(AdapterError, match=r"holds no readable fedlora\.json") as refused:
        description(tmp_path)
    assert str(refused.value).isprintable()
