"""Kills as those of `make chaos`: the command line ended at random moments and continued, against a plain loop."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "chaos.py"


@pytest.fixture(scope="module")
def chaos():
    spec = importlib.util.spec_from_file_location("chaos", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.system
@pytest.mark.timeout(600)
@pytest.mark.parametrize("times", [1, 2])
def test_killed_and_continued_it_ends_the_same(chaos, with_databases, tmp_path, monkeypatch, times):
    monkeypatch.setattr(chaos, "SIGNALS", (chaos.signal.SIGKILL,))
    monkeypatch.setitem(chaos.TINY, "runner.kind", "threads")  # starts sooner; `make chaos` has worker processes
    monkeypatch.delitem(chaos.TINY, "runner.slots")
    kills, wrong = chaos.torment(with_databases(tmp_path), "base updates", times, random.Random(11))
    assert len(kills) == times, (tmp_path / "output.log").read_text()
    assert wrong == []


def test_what_differs_would_be_told(chaos, finished, tmp_path):
    """The comparison itself: a run that is not the same is not called the same."""
    mine, other = chaos.outcome(finished({"seed": 1})), chaos.outcome(finished())
    assert [name for name in mine if mine[name] != other[name]] == ["adapters and state", "metrics"]
