"""A finished sweep behind real servers, made by the commands a user types, and Debian's Chromium to look at it.

`make test-browser` runs these; a plain `pytest` does not (pyproject.toml, norecursedirs).
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml
from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from mlflow_tracking import store

STRATEGIES = ("fedit", "flora-na", "svd")
VIEW = {"width": 1280, "height": 1000}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",  # nothing leaves this machine
]
PATIENCE_MS = 45_000
"""For anything to appear: a loaded machine is slow, and a wait ends when the thing is there."""
OURS = ("PREFECT_", "MLFLOW_", "FEDLORA_")
STANDING: pytest.StashKey[bool] = pytest.StashKey()

expect.set_options(timeout=PATIENCE_MS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say once, and first, what is missing."""
    if any(Path(__file__).parent in item.path.parents for item in items) and chromium() is None:
        pytest.exit("no Chromium on this machine: apt-get install chromium", returncode=1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    if report.when == "call":
        item.stash[STANDING] = not report.failed
    return report


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@dataclass(frozen=True)
class Site:
    """The pages of one finished sweep."""

    prefect: str
    """Address of the server, without `/api`."""
    mlflow: str
    experiment: str
    parent: str
    children: dict[str, str]
    """MLflow run id by strategy."""
    sweep_run: str
    """Flow run of the sweep."""
    federated_runs: dict[str, str]
    """Flow run id by strategy."""
    folder: Path
    printed: str
    """What `fedlora sweep` printed."""
    environment: dict[str, str]
    """In which another command finds the same servers."""

    def deployment(self, name: str) -> str:
        """The id of a deployment."""
        return str(httpx.get(f"{self.prefect}/api/deployments/name/{name}").raise_for_status().json()["id"])


@dataclass(frozen=True)
class Wide:
    """A sweep of more runs than MLflow shows by itself, under two conditions."""

    page: str
    """The address that it printed."""
    parent: str
    """Its page, below the server's address."""
    names: list[str]
    """Of its runs."""


@dataclass
class Called:
    """The addresses that a page asked for."""

    hosts: set[str] = field(default_factory=set)
    foreign: list[str] = field(default_factory=list)
    """Those that are not on this machine; the browser finds no address for them."""

    def note(self, request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme in ("http", "https", "ws", "wss"):
            self.hosts.add(address.hostname or "")
        if not at_home(request.url):
            self.foreign.append(request.url)


def at_home(url: str) -> bool:
    address = urlsplit(url)
    return address.scheme in ("file", "data", "blob", "about") or address.hostname in ("127.0.0.1", "localhost")


def _fedlora(environment: dict[str, str], *words: str) -> str:
    program = Path(sys.executable).with_name("fedlora")
    done = subprocess.run(
        [str(program), *words], env=environment, check=False, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"fedlora {' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@pytest.fixture(scope="session")
def site(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """`fedlora up`, `fedlora sweep FILE`, and `fedlora down` whatever happens."""
    folder = tmp_path_factory.mktemp("a user")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
    environment["FEDLORA_HOME"] = str(folder / "home")
    file = folder / "seen.yaml"
    content = {"name": "seen", "base": "demo", "set": tiny, "grid": {"strategy": list(STRATEGIES)}}
    file.write_text(yaml.safe_dump(content))
    ports = _free_ports()
    prefect, mlflow = (f"http://127.0.0.1:{port}" for port in ports)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever stops the tests stops the servers too
    try:
        _fedlora(environment, "up", "--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1]), "--gpu-runs", "0")
        printed = _fedlora(environment, "sweep", str(file))
        page = re.search(r"#/experiments/(\d+)/runs\?.*?viewStateShareKey=(\w+)", printed)
        assert page, printed
        answer = httpx.post(f"{prefect}/api/flow_runs/filter", json={}).raise_for_status().json()
        flow_runs = {run["name"]: run["id"] for run in answer}
        query = {"experiment_ids": [page[1]], "filter": f"tags.`mlflow.parentRunId` = '{page[2]}'"}
        found = httpx.post(f"{mlflow}/api/2.0/mlflow/runs/search", json=query).raise_for_status().json()["runs"]
        tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in found]
        yield Site(
            prefect=prefect,
            mlflow=mlflow,
            experiment=page[1],
            parent=page[2],
            children={tag["strategy"]: run["info"]["run_id"] for tag, run in zip(tags, found, strict=True)},
            sweep_run=flow_runs.pop("sweep seen"),
            federated_runs=flow_runs,
            folder=next((folder / "home" / "sweeps").iterdir()),
            printed=printed,
            environment=environment,
        )
    finally:
        _fedlora(environment, "down")


@pytest.fixture(scope="session")
def wide(site: Site, tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Wide:
    file = tmp_path_factory.mktemp("wide") / "wide.yaml"
    grid: dict[str, list[Any]] = {"strategy": ["fedit", "svd"], "partition.alpha": [0.1, 100], "seed": [0, 1, 2]}
    file.write_text(yaml.safe_dump({"name": "wide", "base": "demo", "set": {**tiny, "rounds": 1}, "grid": grid}))
    printed = _fedlora(site.environment, "sweep", str(file))
    page = re.search(rf"{re.escape(site.mlflow)}/#/experiments/(\d+)/runs\?.*?viewStateShareKey=(\w+)\S*", printed)
    assert page, printed
    names = [f"{strategy} alpha={alpha} s{seed}" for strategy, alpha, seed in itertools.product(*grid.values())]
    return Wide(page[0], store.run_page(page[1], page[2]), names)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def called() -> Called:
    """What the page of this test has asked for so far."""
    return Called()


@pytest.fixture(scope="session")
def window(browser: Browser) -> Iterator[BrowserContext]:
    """One window for all tests: it loads the scripts of the servers once."""
    opened = browser.new_context(viewport=VIEW)
    opened.set_default_timeout(PATIENCE_MS)
    yield opened
    opened.close()


@pytest.fixture
def page(window: BrowserContext, called: Called, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A tab of its own. If the test fails, it says where a screenshot is."""
    window.on("request", called.note)
    shown = window.new_page()
    yield shown
    if not request.node.stash.get(STANDING, True):
        folder = Path(tempfile.mkdtemp(prefix="fedlora-browser-"))
        for index, each in enumerate(window.pages):
            each.screenshot(path=folder / f"{request.node.originalname}-{index}.png")
        print(f"the browser as it was: {folder}")
    window.remove_listener("request", called.note)
    for each in window.pages:
        each.close()


@pytest.fixture
def errors(page: Page) -> list[str]:
    """What went wrong in the scripts of the page."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    return found
