"""Benchmarks are not run by tests, but they must start: what they import may have moved."""

import os
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.fixture
def own_environment(monkeypatch):
    """Benchmarks set variables when they are imported."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.stem)
def test_it_says_how_it_is_used(script, own_environment, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(script.parent)  # as for a script
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert not end.value.code
    assert "--out" in capsys.readouterr().out
