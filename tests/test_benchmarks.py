"""Benchmarks are not run by tests, but they must start: what they import may have moved."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.stem)
def test_it_says_how_it_is_used(script, tmp_path):
    environment = {**os.environ, "FEDLORA_HOME": str(tmp_path)}
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout
