"""The worked example of docs/plugins.md: built, installed, found by its entry point, checked, and run in the demo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.strategies import registry

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "fedlora-fedavgm"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Where the example is installed."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(EXAMPLE)], check=True, timeout=240)
    return str(target)


@pytest.fixture
def environment(site, tmp_path):
    """The environment of a process that has the example installed."""
    return {**os.environ, "PYTHONPATH": site, "FEDLORA_HOME": str(tmp_path / "home"), "COLUMNS": "200"}


def call(environment, *words):
    command = [str(Path(sys.executable).with_name("fedlora")), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture
def installed(site, monkeypatch):
    """This process as one that has the example installed."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("COLUMNS", "200")
    registry._locations.cache_clear()
    yield
    registry._locations.cache_clear()


def test_it_is_listed_with_its_options(installed, fedlora):
    code, listed, err = fedlora("strategies")
    assert code == 0, err
    assert "fedavgm" in listed
    assert "momentum" in listed


def test_its_own_conformance_test_passes(environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE / "tests")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.system
def test_it_runs_in_the_demo(environment):
    small = ["rounds=1", "clients=2", "data.train_size=200", "data.test_size=60", "training.local_steps=2"]
    done = call(environment, "run", "demo", "strategy=fedavgm", "strategy_options.momentum=0.9", *small)
    assert done.returncode == 0, done.stderr
    assert "fedavgm" in done.stdout


def test_the_page_shows_the_example_as_it_is():
    page, source = (ROOT / "docs" / "plugins.md").read_text(), (EXAMPLE / "fedlora_fedavgm.py").read_text()
    shown = page.split("```python\n")[1].split("```")[0]
    for block in shown.split("        ...\n"):
        assert block.strip("\n") in source
