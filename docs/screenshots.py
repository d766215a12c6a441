"""Takes the pictures of MLflow, Prefect and the report, for the README from a finished sweep `demo` and for MLflow's
how-to from `two-worlds`: `make screenshots`.

Needs `fedlora up` in the same FEDLORA_HOME, and Chromium. The pages that are shown name no machine and no folder.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from deployments.local import environment
from fedlora.files import home
from fedlora.sweep.folder import SweepFolder
from mlflow_tracking import store

IMAGES = Path(__file__).parent / "images"
SHOWN = "svd"
WORLDS, MODEL = "two-worlds", "fedlora-two-worlds-alpha-0.1"
WIDTH = 1280
COLOURS = 192
ANONYMOUS = """home => {
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) texts.currentNode.nodeValue = texts.currentNode.nodeValue.replaceAll(home, "~/.fedlora");
}"""
"""Writes the folder where everything is kept as it is called on most machines."""
PATIENCE_MS = 120_000
IDLE_ASSISTANT = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"


def main() -> None:
    """All pictures."""
    services, program = environment.running_services(), shutil.which("chromium")
    if services is None or program is None:
        sys.exit("nothing to show: start `fedlora up`" if program else "no Chromium: apt-get install chromium")
    demo, worlds = _latest("demo", 3), _latest(WORLDS, 12)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        _charts(browser, services.mlflow_url, demo, "mlflow")
        _howto(browser, services.mlflow_url, worlds)
        _prefect(browser, services.prefect_url)
        _report(browser, demo)
        browser.close()


def _latest(name: str, runs: int) -> SweepFolder:
    """The sweep of this name that was made last, complete."""
    paths = [path for path in home.sweeps().glob(f"{name}-*") if re.fullmatch(rf"{name}-\w+-\d+-\d+", path.name)]
    whole = [folder for folder in map(SweepFolder.read, paths) if folder and len(folder.having("finished")) == runs]
    if not whole:
        sys.exit(f"no finished sweep '{name}' in {home.sweeps()}: `make screenshots` runs it")
    return max(whole, key=lambda folder: folder.path.stat().st_mtime)


def _charts(browser: Browser, server: str, folder: SweepFolder, name: str) -> Page:
    """The page that the sweep printed."""
    page = _page(browser, 900)
    page.add_init_script(IDLE_ASSISTANT)
    page.goto(f"{server}/{store.view_page(folder.parent['experiment'], folder.parent['run'])}")
    cards = page.get_by_test_id("experiment-view-compare-runs-card").filter(visible=True)
    for metric in ("global/accuracy", "rho/model", "global/loss", "global/macro_f1"):
        cards.filter(has_text=metric).locator(".scatterlayer .trace .lines path").first.wait_for()
    cards.locator(".barlayer .point").first.wait_for()
    _save(page, name)
    return page


def _howto(browser: Browser, server: str, folder: SweepFolder) -> None:
    """The five clicks of docs/howto/fedlora-mlflow.md, in their order."""
    page = _charts(browser, server, folder, "mlflow-1-charts")
    for key in ("strategy", "partition.alpha"):
        page.get_by_role("button", name=re.compile("^Group by")).click()
        page.get_by_role("menuitemcheckbox", name=key, exact=True).first.click()
        page.keyboard.press("Escape")
        page.get_by_role("menuitemcheckbox").first.wait_for(state="detached")
    page.get_by_text(re.compile("^Group: strategy")).nth(3).wait_for()
    page.mouse.move(1, 1)  # or a chart shows its tools
    page.locator(".scatterlayer .trace .js-fill").first.wait_for(state="attached")  # the band around a mean
    _save(page, "mlflow-2-means")
    page.goto(f"{server}/{store.run_page(folder.parent['experiment'], _best(folder))}")
    page.get_by_role("link", name=MODEL).first.wait_for()
    _save(page, "mlflow-3-run")
    page.goto(f"{server}/{store.run_page(folder.parent['experiment'], folder.parent['run'])}")
    page.get_by_role("heading", name=f"sweep {WORLDS}").wait_for()
    page.get_by_role("link", name="svd alpha=100 s2").wait_for()  # of the child runs, which come last
    page.get_by_text("Show more", exact=True).click()
    page.get_by_text("Show less", exact=True).wait_for()
    _save(page, "mlflow-4-sweep", 720)
    page.goto(f"{server}/{store.model_page(MODEL)}")
    page.get_by_role("link", name="Version 1").click()
    page.get_by_text("@ champion").wait_for()
    page.get_by_text(re.compile("^Accuracy 0")).wait_for()
    _save(page, "mlflow-5-champion", 620)


def _best(folder: SweepFolder) -> str:
    """The run whose adapter is the champion of the condition that is shown."""
    client = store.client(folder.parent["uri"])
    return str(client.get_model_version_by_alias(MODEL, "champion").run_id)


def _prefect(browser: Browser, server: str) -> None:
    """A run of the sweep: rounds and clients on a line of time, and its log."""
    base = server.removesuffix("/api")
    wanted = {"flow_runs": {"name": {"any_": [SHOWN]}, "state": {"type": {"any_": ["COMPLETED"]}}}, "limit": 1}
    found = httpx.post(f"{server}/flow_runs/filter", json=wanted | {"sort": "START_TIME_DESC"}).raise_for_status()
    page = _page(browser, 800)
    page.goto(f"{base}/runs/flow-run/{found.json()[0]['id']}")
    page.get_by_text("Completed").first.wait_for()
    page.get_by_text(re.compile("10 clients, 8 rounds")).wait_for()
    page.wait_for_load_state("networkidle")  # the timeline, which is a canvas
    _save(page, "prefect")


def _report(browser: Browser, folder: SweepFolder) -> None:
    page = _page(browser, 1000)
    page.goto((folder.path / "report" / "report.html").as_uri())
    page.locator("html[data-ready]").wait_for(state="attached")
    page.locator("#plot-accuracy-rounds .scatterlayer .trace").first.wait_for()
    _save(page, "report")


def _page(browser: Browser, height: int) -> Page:
    page = browser.new_page(viewport={"width": WIDTH, "height": height}, device_scale_factor=1)
    page.set_default_timeout(PATIENCE_MS)
    return page


def _save(page: Page, name: str, height: int | None = None) -> None:
    """Its upper part, as PNG with few colours, those of strategies among them, though rare: a third of the size."""
    page.evaluate(ANONYMOUS, str(home.home()))
    part = {"x": 0, "y": 0, "width": WIDTH, "height": height} if height else None
    shown = Image.open(io.BytesIO(page.screenshot(animations="disabled", clip=part))).convert("RGB")
    target = IMAGES / f"{name}.png"
    few = shown.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(target, optimize=True)
    print(f"{target.name:<22} {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
