"""What is printed, in encodings that lack some of its signs."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.strategies import registry
from fedlora_cli import output, tables

FEDLORA = str(Path(sys.executable).with_name("fedlora"))


def test_signs_are_spelled():
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert output.shown("ρ 0.1 ± 0.2 – 3 × 4 … Σ p B̄ Ŵ é ß", ascii_only) == "rho 0.1 +/- 0.2 - 3 x 4 ... sum p B W e ss"
    assert output.shown("/home/\udcff/漢", ascii_only) == "/home/?/?"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_what_an_encoding_has_stays(encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert output.shown("é ± 0.2", stream) == "é ± 0.2"
    assert output.shown("ρ", stream) == ("ρ" if encoding == "utf-8" else "rho")


def test_columns_stay_straight():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=output.HANDLER)
    tables.listing(("ρ", "x"), [("0.1", "±1"), ("0.22", "2")], stream)
    stream.flush()
    lines = stream.buffer.getvalue().decode().split("\n")
    assert any(line.startswith("|rho") for line in lines)
    assert len({len(line) for line in lines if line.startswith("|")}) == 1


@pytest.mark.parametrize(
    "environ",
    [
        pytest.param({"PYTHONIOENCODING": "latin-1"}, marks=pytest.mark.system),  # and test_run.py
        {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
    ],
    ids=["latin-1", "C"],
)
def test_every_listing_is_printed_where_output_is_not_utf8(environ):
    """In one process, as it must be for its locale: every strategy's page, all lists, the help, an error."""
    names = registry.names()
    words = [["strategies"], ["models"], ["--help"], ["sweep", "--help"], ["run", "demo", "ρ=1"]]
    code = f"""
import sys
from fedlora_cli import app as cli
for words in {[*words, *(["strategies", name] for name in names)]!a}:
    sys.argv = ["fedlora", *words]
    try:
        cli.main()
    except SystemExit as end:
        print(words, end.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, timeout=120, check=True
    )
    assert b"Traceback" not in done.stderr
    assert done.stderr.decode("latin-1").startswith("error: unknown key 'rho'")
    codes = [line for line in done.stdout.decode("latin-1").splitlines() if line.startswith("[")]
    assert len(codes) == len(words) + len(names)
    assert sum(line.endswith(" 0") for line in codes) == len(codes) - 1


@pytest.mark.parametrize(("terminal", "shown"), [(True, "looking\n"), (False, "")])
def test_what_is_being_done_is_told_to_a_terminal_only(monkeypatch, terminal, shown):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", stream)
    output.busy("looking")
    assert stream.getvalue() == shown
