"""Every command that README and docs show: run as it stands where that takes seconds, otherwise read as the program
itself reads it. A block without a language is a block of commands, `console` a session, `text` an output; a
command that nobody has classified here fails."""

import ast
import importlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import click
import pandas as pd
import pytest
import typer
import yaml

from deployments.local import registering as deploying
from deployments.shipped import PRESETS, SWEEPS
from fedlora.config import configfile
from fedlora.model import known
from fedlora.run import preflight
from fedlora.sweep import plan as sweeps
from fedlora_cli import app as cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = {
    r"ssh ": "another machine",
    r"docker |cp deployments/docker/env.example deployments/.env$": "a container engine",
    r"caddy ": "another program",
    r"read -rs PASSWORD && ": "a password is typed",
    r"pip install (prefect-(docker|kubernetes)|psycopg2-binary)$": "a package index",
    r"fedlora (strategies half-step|sweep half\.yaml)$": "the page's plug-in, see test_docs.py",
    r"fedlora run demo strategy=fedavgm ": "the example's plug-in, see test_plugin_package.py",
    r"pip install -e \. --no-deps$": "the page's plug-in, see test_docs.py",
    r"fedlora run demo model.name=distilbert/": "a model of the hub",
    r"fedlora (run|sweep) standard": "data and model of the hub",
    r"fedlora .* runner.device=cuda$": "a GPU",
    r"python3 benchmarks/gpu\.py ": "a GPU, and a Python without us; see test_gpu.py",
    r"(ray start|dask (scheduler|worker)) ": "another machine",
    r"fedlora (run demo --run-dir|resume) s3://": "a bucket",
}
"""Commands that are only looked at, and what they need. (`make standard` and the like are looked at by make itself.)"""


@dataclass(frozen=True)
class Command:
    """A command of a page, with the output that the page shows below it."""

    page: Path
    line: str
    shown: str = ""

    def __str__(self) -> str:
        return f"{self.page.name}: {self.line}"

    @property
    def words(self) -> list[str]:
        """Without variables before it, the folder of the program, and what follows `#` or `&`."""
        words = shlex.split(self.line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        return [re.sub(r"^(…/)?\.venv/bin/", "", words[0]), *(word for word in words[1:] if word != "&")]


def blocks(page):
    """Language and text of the fenced blocks of a page."""
    return re.findall(r"^```(\S*)\n(.*?)^```$", page.read_text("utf-8"), flags=re.M | re.S)


def commands():
    for page in PAGES:
        for language, text in blocks(page):
            if language == "console":
                for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
                    line, _, shown = part.partition("\n")
                    yield Command(page, line, shown.strip())
            elif not language and not re.match(r"# \S+\.yaml\n", text):
                lines = text.replace("\\\n", " ").splitlines()
                yield from (Command(page, line) for line in lines if line.strip() and not line.startswith("#"))


COMMANDS = list(dict.fromkeys(commands()))
OURS = [each for each in COMMANDS if each.words[0] == "fedlora"]


def elsewhere(command):
    line = shlex.join(command.words) if command.words[0] not in ("read",) else command.line
    return next((why for pattern, why in ELSEWHERE.items() if re.match(pattern, line)), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, finished, kinds):
    """Where a reader of all pages would be: with the files that they make, and those that they take for granted."""
    folder, before = tmp_path_factory.mktemp("reader"), Path.cwd()
    os.chdir(folder)
    try:
        for page in PAGES:
            for language, text in blocks(page):
                name = re.match(r"# (\S+\.(?:py|yaml))\n", text)
                if name and language in ("python", "yaml", ""):
                    Path(name[1]).write_text(text, "utf-8")
                    if name[1] in ("make_csv.py", "save_model.py"):
                        exec(text, {"__name__": "__main__"})
    finally:
        os.chdir(before)
    texts = [f"review number {i} of a book" for i in range(300)]
    pd.DataFrame({"text": texts, "stars": [i % 5 for i in range(300)]}).to_csv(folder / "reviews.csv", index=False)
    glosses = {
        "gloss": [f"a {'very ' * (i % 7)}small bird" for i in range(300)],
        "length": [0.3 + i % 7 / 10 for i in range(300)],
    }
    pd.DataFrame(glosses).to_csv(folder / "glosses.csv", index=False)
    (folder / "tasks.jsonl").write_text(kinds().read_text() * 4)
    for number, name in enumerate(("alice", "bob", "carol")):
        shutil.copytree(finished({"seed": number}) / "adapter", folder / name)
    return folder


@pytest.fixture
def reader(folder, monkeypatch):
    """With another decoder where the packaged one would be, which not everybody has installed."""
    decoder = replace(known.KNOWN["smollm2-135m"], package=None, inside="llama-tiny")
    monkeypatch.setitem(known.KNOWN, "smollm2-135m", decoder)
    monkeypatch.chdir(folder)
    return folder


def parsed(words):
    """What our command line makes of the words, without doing it."""
    command = typer.main.get_command(cli.app).commands[words[0]]
    if len(words) > 1 and words[1] in getattr(command, "commands", {}):
        command, words = command.commands[words[1]], words[1:]
    with command.make_context(words[0], list(words[1:])) as context:
        return context.params


@pytest.mark.parametrize("command", OURS, ids=str)
def test_a_command_of_ours_would_begin(command, reader, fedlora):
    try:
        params = parsed(command.words[1:])
    except click.ClickException as error:
        pytest.fail(error.format_message())
    except click.exceptions.Exit:  # --help
        return
    if elsewhere(command) or command.words[1] not in ("run", "sweep"):
        return
    if command.words[1] == "sweep":
        source, changes = params["file"], configfile.parse_overrides(params["overrides"] or [])
        for cell in sweeps.load(source, configfile.absolute_paths(changes), PRESETS, SWEEPS).cells:
            preflight.check(cell.config)
    elif not command.shown.startswith("error:"):
        code, out, err = fedlora(*command.words[1:], *["--check"] * (not params["check"]))
        assert (code, err) == (0, "")
        assert out.startswith("OK: ")


def wildcard(shown):
    """What a page shows as a pattern: `…` is anything, a number any number, a line break any space."""
    text = re.escape(" ".join(shown.split()))
    return re.sub(r"\d[\d.]*", r"[\\d.]+", text.replace("…", ".*"))


@pytest.mark.parametrize("command", [each for each in OURS if each.shown.startswith(("error:", "OK:"))], ids=str)
def test_what_a_page_shows_is_what_is_said(command, reader, fedlora):
    code, out, err = fedlora(*command.words[1:])
    assert code == (2 if command.shown.startswith("error:") else 0)
    assert re.fullmatch(wildcard(command.shown), " ".join((err or out).split())), f"{err or out}"


def test_adapters_are_aggregated_and_merged_as_shown(reader, fedlora):
    """Every `aggregate` and `merge` of the pages, in their order: the latter takes what the former left."""
    done = 0
    for command in OURS:
        if command.words[1] in ("aggregate", "merge"):
            words = command.words[1:]
            if command.words[1] == "aggregate":
                shutil.rmtree("global", ignore_errors=True)
                Path("report.json").unlink(missing_ok=True)
            code, _, err = fedlora(*words)
            assert (code, err) == (0, ""), str(command)
            done += 1
    assert done >= 3
    assert json.loads(Path("report.json").read_text())["strategy"]


def _export(command):
    ours = (
        path
        for package in ("deployments", "tasks", "flows", "mlflow_tracking")
        for path in (ROOT / package).rglob("*.py")
    )
    known = "".join(path.read_text("utf-8") for path in ours)
    for word in command.words[1:]:
        assert word.partition("=")[0] in known, f"{word}: nothing of ours knows this variable"


def _prefect(command):
    from prefect.cli._app import _app

    words = [word for word in command.words[1:] if word != "--no-prompt"]
    _app.parse_args(words, exit_on_error=False, print_error=False)
    if words[:2] == ["deployment", "run"]:
        from prefect.flows import load_flow_from_entrypoint

        name, given = (
            words[2],
            [word.partition("=") for before, word in pairwise(words) if before == "-p"],
        )
        (declared,) = [each for each in deploying.declared() if each["name"] == name.partition("/")[2]]
        flow = load_flow_from_entrypoint(str(ROOT / declared["entrypoint"]), use_placeholder_flow=False)
        assert flow.name == name.partition("/")[0]
        values = {key: yaml.safe_load(value) for key, _, value in given}
        flow.validate_parameters({**declared.get("parameters", {}), **values})
        if "overrides" in values:
            configfile.build(values["overrides"])
    for flag in ("--prefect-file", "--base-job-template"):
        if flag in words and "mine.yaml" not in words[words.index(flag) + 1]:
            assert (ROOT / words[words.index(flag) + 1]).is_file()


def _make(command):
    for target in command.words[1:]:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def _pip(command):
    words = command.words[2:]
    if words[0] == "-c":
        assert (ROOT / words[1]).is_file()
        words = words[2:]
    for word in words:
        extra = re.fullmatch(r"fedlora\[(\w+)\]", word)
        if extra:
            assert f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()
        elif "/" in word:
            assert (ROOT / word / "pyproject.toml").is_file()
        elif not word.startswith("-"):
            importlib.metadata.version(word)  # tested with: it is installed here


def _python(command):
    script, given = command.words[1], command.words[2:]
    file = next(path for path in (ROOT / script, Path(script)) if path.exists())
    assert all(f'"{word}"' in file.read_text("utf-8") for word in given if word.startswith("--"))


def _head(command):
    done = subprocess.run(command.words, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 3


CHECKS = {"prefect": _prefect, "make": _make, "pip": _pip, "python": _python, "head": _head, "export": _export}


@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in OURS], ids=str)
def test_a_command_of_another_program_is_read(command, reader):
    if elsewhere(command):
        return
    assert command.words[0] in CHECKS, f"{command} is of no kind that is checked, and of none that needs another place"
    CHECKS[command.words[0]](command)


def test_nothing_is_excused_that_is_not_there():
    for pattern in ELSEWHERE:
        assert any(elsewhere(command) == ELSEWHERE[pattern] for command in COMMANDS), pattern


def test_every_block_says_what_it_is():
    known = {"", "console", "text", "yaml", "yml", "python", "toml", "json"}
    assert {language for page in PAGES for language, _ in blocks(page)} <= known


def test_a_deployment_of_ones_own_is_registered_as_shown():
    (text,) = [text for page in PAGES for language, text in blocks(page) if language == "yml"]
    ours = (ROOT / "deployments/prefect.yaml").read_text("utf-8")
    head = ours.partition("\ndeployments:\n")[0]
    (own,) = yaml.safe_load(f"{head}\ndeployments:\n{text}")["deployments"]
    assert own["name"] == "mine-nightly"
    assert own["entrypoint"] == next(each["entrypoint"] for each in deploying.declared() if each["name"] == "nightly")
    from flows.sweep import run_sweep

    run_sweep.validate_parameters(own["parameters"])


PYTHON = [(page, text) for page in PAGES for language, text in blocks(page) if language == "python"]


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=[f"{page.name}-{n}" for n, (page, _) in enumerate(PYTHON)])
def test_python_in_the_docs_imports_and_calls_what_there_is(page, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fedlora":
            assert hasattr(importlib.import_module("fedlora"), node.attr), node.attr


@pytest.mark.system
@pytest.mark.parametrize(
    "command", [each for each in OURS if each.words[1] == "run" and not each.shown and not elsewhere(each)], ids=str
)
def test_a_run_of_the_docs_runs(command, reader, fedlora, prefect_server, store_uri, tmp_path):
    """As shown, but shorter: one round, few steps."""
    short = ["rounds=1", "training.local_steps=2", "training.warmup_steps=0", "runner.kind=threads"]
    words = [word for word in command.words[1:] if not word.startswith("--run-dir")]
    code, out, err = fedlora(*words, *short, f"tracking.uri={store_uri}", "--run-dir", tmp_path / "run")
    assert code == 0, err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert "round 1/1" in out
