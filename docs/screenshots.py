"""Takes the README's pictures of MLflow, Prefect and the report from a finished `demo` sweep: `make screenshots`.

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
SWEEP, RUNS, SHOWN = "demo", 3, "svd"
WIDTH = 1280
COLOURS = 192
PATIENCE_MS = 120_000
IDLE_ASSISTANT = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
FILTER = "^(global/(accuracy|macro_f1)|rho/(model|floor))$"


def main() -> None:
    """All three pictures."""
    services, program = environment.running_services(), shutil.which("chromium")
    if services is None or program is None:
        sys.exit("nothing to show: start `fedlora up`" if program else "no Chromium: apt-get install chromium")
    folder = _latest()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        _mlflow(browser, services.mlflow_url, folder)
        _prefect(browser, services.prefect_url)
        _report(browser, folder)
        browser.close()


def _latest() -> SweepFolder:
    """The demo sweep that was made last, complete."""
    paths = [path for path in home.sweeps().glob(f"{SWEEP}-*") if re.fullmatch(rf"{SWEEP}-\w+-\d+-\d+", path.name)]
    whole = [folder for folder in map(SweepFolder.read, paths) if folder and len(folder.having("finished")) == RUNS]
    if not whole:
        sys.exit(f"no finished sweep '{SWEEP}' in {home.sweeps()}: `fedlora sweep {SWEEP}`")
    return max(whole, key=lambda folder: folder.path.stat().st_mtime)


def _mlflow(browser: Browser, server: str, folder: SweepFolder) -> None:
    page = _page(browser, 1130)
    page.add_init_script(IDLE_ASSISTANT)
    page.goto(f"{server}/{store.sweep_page(folder.parent['experiment'], folder.parent['run'])}")
    page.get_by_placeholder("Search metric charts").fill(FILTER)
    cards = page.get_by_test_id("experiment-view-compare-runs-card").filter(visible=True)
    for metric in ("global/accuracy", "global/macro_f1", "rho/model", "rho/floor"):
        cards.filter(has_text=metric).locator(".scatterlayer .trace .lines path").first.wait_for()
    _save(page, "mlflow")


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


def _save(page: Page, name: str) -> None:
    """As PNG with few colours, those of strategies among them, though rare: the file is a third of the size."""
    shown = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
    target = IMAGES / f"{name}.png"
    few = shown.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(target, optimize=True)
    print(f"{target.name:<12} {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
