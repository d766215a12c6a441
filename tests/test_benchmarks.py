"""Benchmarks are not run by tests, but they must start: what they import may have moved."""

import json
import os
import runpy
import subprocess
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


WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(["prefect", "mlflow", "datasets", "pandas", "pyarrow"]))
del sys.argv[0]
sys.path.insert(0, sys.argv[0] + "/plain")
sys.argv[0] += "/gpu.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_one_for_gpus_needs_torch_transformers_and_peft_alone_and_runs_on_a_cpu(tmp_path):
    small = ["--smaller", "16", "--steps", "2", "--batch", "4", "--tokens", "8", "--repeats", "1", "--clients", "1,2"]
    command = [sys.executable, "-c", WITHOUT, str(BENCHMARKS[0].parent), "--models", "bert-tiny,decoder-1b", *small]
    out = tmp_path / "gpu.json"
    subprocess.run([*command, "--device", "cpu", "--dtype", "fp32", "--out", str(out)], check=True, timeout=240)
    found = json.loads(out.read_text())
    assert [(row["model"], row["clients"]) for row in found["rows"]] == [
        (model, count) for model in ("bert-tiny", "decoder-1b") for count in (1, 2)
    ]
    assert max(found["difference"].values()) < 1e-4
    assert all(row["clients_s"] > 0 and row["memory_mb"] > 0 and row["share"] > 0 for row in found["rows"])
