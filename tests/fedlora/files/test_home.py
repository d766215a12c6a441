"""Where everything is kept, whatever the folder is called."""

import sqlite3
from contextlib import closing

import pytest
from sqlalchemy import create_engine, text

from fedlora.errors import ConfigError
from fedlora.files import home

NAMES = [
    "plain",
    "a b",
    "feature%2Fx",
    "100%",
    "%(x)s",
    "what?x",
    "a#b",
    "a?b=c&d%3F",
    "ρ ü",
    "a'b\"c",
    "a;b@c:d",
    "[1]*",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_database_is_in_the_file_that_was_meant(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    with closing(sqlite3.connect(folder / "x.db")) as database:
        database.execute("create table here (x)")
    engine = create_engine(home.sqlite_url(folder / "x.db"))
    with engine.connect() as connection:
        assert connection.execute(text("select name from sqlite_master")).scalar() == "here"
    engine.dispose()
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_an_ordinary_path_is_an_ordinary_address(tmp_path):
    assert home.sqlite_url(tmp_path / "x.db") == f"sqlite:///{tmp_path}/x.db"
    assert home.sqlite_url(tmp_path / "x.db", "aiosqlite") == f"sqlite+aiosqlite:///{tmp_path}/x.db"


@pytest.mark.parametrize(
    ("name", "what"),
    [("a::b", "'::'"), ("a\nb", r"'\\n'"), ("a\tb", r"'\\t'"), ("a\udcffb", "0xff, which is not UTF-8")],
)
def test_a_home_that_no_address_can_carry_is_one_line(tmp_path, monkeypatch, name, what):
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / name))
    with pytest.raises(ConfigError, match=f"holds .*{what}.*; choose a folder without it") as refused:
        home.home()
    assert str(refused.value).isprintable()
    assert not list(tmp_path.iterdir())
