"""What the docs say is generated from, or checked against, the code."""

import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
import typer

from deployments.shipped import PRESETS, SWEEPS
from fedlora.config import configfile
from fedlora.sweep import plan as sweeps

ROOT = Path(__file__).parent.parent
HOWTOS = sorted((ROOT / "docs/howto").glob("*.md"))
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *HOWTOS,
    *sorted((ROOT / "docs/strategies").glob("*.md")),
]


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
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        if target.startswith("http"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}#{anchor}"


def anchors(page):
    """What the headings of a page are called in links to them, as on GitHub."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_use_keys_presets_and_sweeps_that_exist(page):
    known = set(configfile.dotted_keys())
    text = page.read_text()
    ours = {path.stem for path in [*PRESETS.glob("*.yaml"), *SWEEPS.glob("*.yaml")]}
    shown = set(re.findall(r"^```(?:yaml)?\n# (\S+\.yaml)$", text, flags=re.M))
    for command in re.findall(r"^(?:\$ )?(?:\.venv/bin/)?fedlora (?:run|sweep) (.+)$", text, flags=re.M):
        words = shlex.split(command, comments=True)
        assert words[0] in ours | shown or "=" in words[0], command  # `fedlora run key=value` changes the demo
        for key in (word.split("=")[0] for word in words if "=" in word):
            assert key in known or key.startswith("strategy_options."), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_have_the_options_that_they_are_given(page):
    from fedlora_cli import app as cli

    commands = typer.main.get_command(cli.app).commands
    for name, rest in re.findall(
        r"^(?:\$ )?(?:\S+=\S+ )*(?:\.venv/bin/)?fedlora ([a-z]+)(.*)$", page.read_text(), flags=re.M
    ):
        assert name in commands, f"fedlora {name}"
        command = commands[name]
        below = getattr(command, "commands", {}).get(rest.split()[0] if rest.split() else "", command)
        known = {option for parameter in below.params for option in parameter.opts}
        assert set(re.findall(r"(?<= )--[a-z-]+", rest.split("#")[0])) <= known | {"--help"}, f"fedlora {name}{rest}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_deployments_named_in_the_docs_are_declared(page):
    from prefect.flows import load_flow_from_entrypoint

    from deployments.local import registering as deploying

    declared = {each["name"]: each["entrypoint"] for each in deploying.declared()}
    for word, rest in re.findall(
        r"^prefect deployment (?:run|schedule \w+) '?([\w/-]+)'?(.*)$", page.read_text(), flags=re.M
    ):
        flow, _, name = word.partition("/")
        assert name in declared, word
        found = load_flow_from_entrypoint(str(ROOT / declared[name]), use_placeholder_flow=False)
        assert found.name == flow, word
        assert set(re.findall(r"-p '?(\w+)=", rest)) <= set(found.parameters.properties), f"{word}{rest}"


@pytest.mark.parametrize("page", HOWTOS, ids=lambda page: page.name)
def test_every_how_to_ends_with_what_the_reader_should_see(page):
    assert re.findall(r"^## (.+)$", page.read_text(), flags=re.M)[-1] == "What you should see"


def test_every_how_to_is_linked_from_the_start_page():
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text())}
    assert not set(HOWTOS) - linked


def test_yaml_in_the_docs_is_a_valid_sweep(tmp_path):
    blocks = [block for page in PAGES for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.S)]
    assert blocks
    for number, block in enumerate(blocks):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        assert sweeps.load(str(file), None, PRESETS, SWEEPS).cells


def test_every_sweep_that_comes_along_is_valid():
    for path in SWEEPS.glob("*.yaml"):
        assert sweeps.load(path.stem, None, PRESETS, SWEEPS).cells, path.name


def test_the_strategy_in_the_docs_runs(monkeypatch):
    import torch

    from fedlora.adapter import Adapter, Factors
    from fedlora.adapter.updates import Update, Updates
    from fedlora.strategies.base import ServerState
    from fedlora.strategies.step import advance

    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "strategies.md").read_text(), flags=re.S).group(1)
    namespace: dict = {"__name__": "example"}
    exec(code, namespace)
    adapters = [Adapter({"m": Factors(torch.rand(4, 2), torch.rand(2, 3))}) for _ in range(2)]
    updates = Updates.collect(Update(client, 1, adapter) for client, adapter in enumerate(adapters))
    state = advance(namespace["FirstClient"](), ServerState(adapters[0]), updates)
    assert torch.equal(state.adapter.factors["m"].B, adapters[0].factors["m"].B)


def example(page, name):
    """The code of a how-to that is to be saved under a name."""
    text = (ROOT / "docs/howto" / page).read_text()
    return re.search(rf"```python\n(# {re.escape(name)}\n.*?)```", text, flags=re.S).group(1)


def test_the_strategy_of_the_how_to_conforms(tmp_path, monkeypatch):
    from fedlora.testing import check_strategy

    (tmp_path / "fedlora_halfstep.py").write_text(example("add-a-strategy.md", "fedlora_halfstep.py"))
    monkeypatch.syspath_prepend(tmp_path)
    check_strategy(importlib.import_module("fedlora_halfstep").HalfStep())


def test_the_data_of_the_how_to_has_what_its_commands_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(example("my-own-data.md", "make_csv.py"), {})
    found = pd.read_csv("docstrings.csv")
    assert list(found) == ["says", "kind", "package"]
    assert (found["kind"].nunique(), found["package"].nunique()) == (2, 6)


def test_the_model_of_the_how_to_can_be_loaded(tmp_path, monkeypatch):
    from fedlora.config import ModelConfig
    from fedlora.model import base as model

    monkeypatch.chdir(tmp_path)
    exec(example("my-own-model.md", "save_model.py"), {})
    loaded = model.load_base(ModelConfig(name="./my-encoder", pooling="mean"), ["a", "b"])
    assert model.load_tokenizer(ModelConfig(name="./my-encoder"))
    assert sum(parameter.numel() for parameter in loaded.parameters()) > 4e6


def test_every_service_of_the_prefect_server_is_in_the_table():
    """A release of Prefect that adds one ends here: see it at its work, and say what it does for us."""
    from prefect.server.api import server  # noqa: F401 (its import registers them)
    from prefect.server.services.base import Service
    from prefect.server.services.perpetual_services import get_perpetual_services

    names = {each.function.__name__ for each in get_perpetual_services()} | {
        each.__name__ for each in Service.all_services()
    }
    assert len(names) > 15
    page = (ROOT / "docs" / "deployments.md").read_text()
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_when_the_newest_releases_last_worked_is_what_was_measured():
    found = json.loads((ROOT / "docs" / "data" / "newest.json").read_text())
    page = (ROOT / "docs" / "reliability.md").read_text()
    row = " | ".join([found["green"], found["python"], *found["versions"].values()])
    assert f"| {row} |" in page
    assert f"| last green | Python | {' | '.join(found['versions'])} |" in page


def test_no_place_of_a_particular_machine_is_named():
    import subprocess

    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=False).stdout
    texts = [ROOT / name for name in listed.split("\0") if name.endswith((".py", ".md", ".yaml", ".toml", "Makefile"))]
    pattern = re.compile(r"/(?:work|root|home/\w+|opt)/(?!fedlora\b)[a-z.]")  # /opt/fedlora is in our containers
    assert not [path for path in texts if path.exists() and path != Path(__file__) and pattern.search(path.read_text())]
