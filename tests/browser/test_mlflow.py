"""What a finished sweep looks like in MLflow's pages."""

from __future__ import annotations

import json
import re
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from fedlora.report.plots import colour
from mlflow_tracking import store

# One shown line per run: MLflow draws the smoothed one over a faint copy of the data.
LINES = "card => card._fullData.filter(line => line.mode.includes('markers')).map(line => [line.name, line.line.color])"


FOLDED = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
VIEW = {"width": 1280, "height": 1000}
PATIENCE_MS = 45_000


@pytest.fixture
def mlflow(page: Page) -> Page:
    """A page where MLflow's assistant stays folded: it opens on the first visit, over a quarter of the window."""
    page.add_init_script(FOLDED)
    return page


def chart_page(site) -> str:
    """The address that `fedlora sweep` prints."""
    return str(re.search(rf"{re.escape(site.mlflow)}/#\S+", site.printed)[0])  # type: ignore[index]


def in_model_training(mlflow: Page) -> None:
    """The side bar is that of runs and models; on a first visit it would be that of traces and prompts."""
    expect(mlflow.get_by_role("link", name="Model registry")).to_be_visible()
    expect(mlflow.get_by_text("AI Gateway")).to_be_hidden()


@pytest.mark.parametrize(("section", "metric"), [("global", "global/accuracy"), ("rho", "rho/model")])
def test_a_section_has_one_line_per_strategy_in_its_colour(site, mlflow, called, section, metric):
    mlflow.goto(chart_page(site))
    expect(mlflow.get_by_text(f"{len(site.children)} matching runs")).to_be_visible()
    in_model_training(mlflow)
    for strategy in site.children:
        expect(mlflow.get_by_role("link", name=strategy, exact=True)).to_be_visible()
    mlflow.get_by_placeholder("Search metric charts").fill(f"^{metric}$")
    cards = mlflow.get_by_test_id("experiment-view-compare-runs-card").filter(visible=True)
    expect(cards).to_have_count(1)  # the filter has taken the others away
    expect(cards.first).to_contain_text(metric)
    expect(mlflow.get_by_role("figure").filter(has_text=re.compile(rf"^{section}\s*\(1\)"))).to_be_visible()
    expect(cards.locator(".scatterlayer .trace .lines path").first).to_be_visible()
    lines = cards.locator(".js-plotly-plot").evaluate(LINES)
    assert sorted(lines) == sorted([name, colour(name)] for name in site.children)
    assert called.foreign == []


def test_the_compare_page_sets_the_strategies_side_by_side(site, mlflow, called):
    runs = quote(json.dumps(list(site.children.values())))
    mlflow.goto(f"{site.mlflow}/#/compare-runs?runs={runs}&experiments={quote(json.dumps([site.experiment]))}")
    expect(mlflow.get_by_role("heading", name="Comparing 3 Runs from 1 Experiment")).to_be_visible()
    row = mlflow.get_by_role("row").filter(has_text=re.compile("^strategy")).first
    for strategy in site.children:
        expect(row).to_contain_text(strategy)
    for metric in ("global/accuracy", "final/accuracy", "bytes/total"):  # the list goes on below the fold
        expect(mlflow.get_by_text(metric, exact=True).last).to_be_visible()
    assert called.foreign == []


def test_the_sweeps_description_leads_to_its_runs(site, mlflow, called):
    mlflow.goto(f"{site.mlflow}/{store.run_page(site.experiment, site.parent)}")
    for shown in ("partition.hash", "data.digest", "wordnet-nouns"):
        expect(mlflow.get_by_text(shown).first).to_be_visible()
    in_model_training(mlflow)
    mlflow.get_by_text("Show more", exact=True).click()
    board = mlflow.get_by_test_id("note-editor-preview-content").get_by_role("table")
    expect(board.get_by_role("row")).to_have_count(1 + len(site.children))
    for strategy, run in site.children.items():
        link = board.get_by_role("row").filter(has_text=strategy).get_by_role("link", name="run")
        expect(link).to_have_attribute("href", store.run_page(site.experiment, run))
    with mlflow.context.expect_page() as opened:
        board.get_by_role("row").filter(has_text="svd").get_by_role("link", name="run").click()
    expect(opened.value.get_by_role("heading", name="svd", exact=True)).to_be_visible()
    assert called.foreign == []


def test_the_report_is_alive_in_the_artifact_viewer(site, mlflow, called):
    mlflow.goto(f"{site.mlflow}/{store.artifact_page(site.experiment, site.parent, 'report/report.html')}")
    report = mlflow.frame_locator("iframe")
    expect(report.get_by_role("heading", name="Sweep seen")).to_be_visible()
    plot = report.locator("#plot-accuracy-rounds")
    expect(plot.locator(".scatterlayer .trace")).to_have_count(len(site.children))
    in_model_training(mlflow)
    report.get_by_role("checkbox", name="svd").uncheck()
    expect(plot.locator(".scatterlayer .trace")).to_have_count(len(site.children) - 1)
    assert called.foreign == []


def test_the_sweeps_run_is_found_without_a_link(site, browser):
    """As the first comparison's how-to says; in a new window, for MLflow remembers the chart page's filter."""
    with browser.new_context(viewport=VIEW) as window:
        page = window.new_page()
        page.add_init_script(FOLDED)
        page.add_locator_handler(page.get_by_role("button", name="Got it"), lambda button: button.click())
        page.goto(f"{site.mlflow}/#/experiments/{site.experiment}")
        page.get_by_text("Model training", exact=True).click(timeout=PATIENCE_MS)
        page.get_by_role("link", name="sweep seen", exact=True).click(timeout=PATIENCE_MS)
        expect(page.get_by_role("heading", name="sweep seen", exact=True)).to_be_visible()


def test_the_best_adapter_is_registered(site, mlflow, called):
    mlflow.goto(f"{site.mlflow}/#/models/fedlora-seen")
    expect(mlflow.get_by_role("heading", name="fedlora-seen")).to_be_visible()
    expect(mlflow.get_by_text("models:/fedlora-seen@champion")).to_be_visible()
    expect(mlflow.get_by_role("link", name="Version 1")).to_be_visible()
    assert called.foreign == []
