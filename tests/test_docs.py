"""What the docs say is generated from, or checked against, the code."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from fedlora import configfile
from flows.presets import PRESETS, SWEEPS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/strategies").glob("*.md"))]


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date():
    for page, content in generator().pages().items():
        assert page.read_text() == content, f"run: python docs/generate.py ({page.name} is out of date)"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_use_keys_presets_and_sweeps_that_exist(page):
    known = set(configfile.dotted_keys())
    for command in re.findall(r"^(?:\.venv/bin/)?fedlora (?:run|sweep) (.+)$", page.read_text(), flags=re.M):
        words = command.split("#")[0].split()
        assert words[0] in {path.stem for path in [*PRESETS.glob("*.yaml"), *SWEEPS.glob("*.yaml")]}, command
        for key in (word.split("=")[0] for word in words[1:] if "=" in word):
            assert key in known or key.startswith("strategy_options."), command


def test_yaml_in_the_docs_is_a_valid_sweep(tmp_path):
    from flows import sweep

    blocks = [block for page in PAGES for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.S)]
    assert blocks
    for number, block in enumerate(blocks):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        assert sweep.load(str(file)).cells()


def test_every_sweep_that_comes_along_is_valid():
    from flows import sweep

    for path in SWEEPS.glob("*.yaml"):
        assert sweep.load(path.stem).cells(), path.name


def test_the_strategy_in_the_docs_runs(monkeypatch):
    import torch

    from fedlora.adapter import Adapter, Factors
    from fedlora.strategies.base import ServerState, advance
    from fedlora.updates import Update, Updates

    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "strategies.md").read_text(), flags=re.S).group(1)
    namespace: dict = {"__name__": "example"}
    exec(code, namespace)
    adapters = [Adapter({"m": Factors(torch.rand(4, 2), torch.rand(2, 3))}) for _ in range(2)]
    updates = Updates.collect(Update(client, 1, adapter) for client, adapter in enumerate(adapters))
    state = advance(namespace["FirstClient"](), ServerState(adapters[0]), updates)
    assert torch.equal(state.adapter.factors["m"].B, adapters[0].factors["m"].B)


def test_no_place_of_a_particular_machine_is_named():
    import subprocess

    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=False).stdout
    texts = [ROOT / name for name in listed.split("\0") if name.endswith((".py", ".md", ".yaml", ".toml", "Makefile"))]
    pattern = re.compile(r"/(?:work|root|home/\w+|opt)/[a-z.]")
    assert not [path for path in texts if path.exists() and path != Path(__file__) and pattern.search(path.read_text())]
