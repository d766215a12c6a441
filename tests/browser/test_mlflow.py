"""What a finished sweep looks like in MLflow's pages."""

from __future__ import annotations

import itertools
import json
import re
from urllib.parse import quote

import pytest
from playwright.sync_api import Locator, Page, expect

from fedlora.objective.classification import ACCURACY
from fedlora.report.plots import colour
from mlflow_tracking import store, views

FIRST = views.first(ACCURACY)

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


def cards(mlflow: Page) -> Locator:
    """The charts that are to be seen."""
    return mlflow.get_by_test_id("experiment-view-compare-runs-card").filter(visible=True)


@pytest.mark.parametrize(("section", "metric"), [(FIRST, "global/accuracy"), ("global", "global/macro_f1")])
def test_a_section_has_one_line_per_strategy_in_its_colour(site, mlflow, called, section, metric):
    mlflow.goto(chart_page(site))
    expect(mlflow.get_by_text(f"{len(site.children)} matching runs")).to_be_visible()
    in_model_training(mlflow)
    for strategy in site.children:
        expect(mlflow.get_by_role("link", name=strategy, exact=True)).to_be_visible()
    mlflow.get_by_placeholder("Search metric charts").fill(f"^{metric}$")
    expect(cards(mlflow)).to_have_count(1)  # the filter has taken the others away
    expect(cards(mlflow).first).to_contain_text(metric)
    expect(mlflow.get_by_role("figure").filter(has_text=re.compile(rf"^{section}\s*\(1\)"))).to_be_visible()
    expect(cards(mlflow).locator(".scatterlayer .trace .lines path").first).to_be_visible()
    lines = cards(mlflow).locator(".js-plotly-plot").evaluate(LINES)
    assert sorted(lines) == sorted([name, colour(name)] for name in site.children)
    assert called.foreign == []


def test_the_printed_link_opens_every_run_condition_by_condition_with_accuracy_and_rho_first(wide, mlflow, called):
    """Without the view: ten runs, best first, so that one condition may be hidden; and R, P, Q and bytes at the top."""
    mlflow.goto(wide.page)
    expect(mlflow.get_by_text(f"{len(wide.names)} matching runs")).to_be_visible()
    in_model_training(mlflow)
    sections = mlflow.get_by_role("figure")
    expect(sections.nth(0)).to_contain_text(re.compile(rf"^{FIRST}\s*\(3\)"))
    expect(sections.nth(1)).to_contain_text(re.compile(r"^global\s*\("))
    for place, metric in enumerate(("global/accuracy", "rho/model", "final/accuracy")):
        expect(cards(mlflow).nth(place)).to_contain_text(metric)
    for drawn in (cards(mlflow).nth(0).locator(".scatterlayer"), cards(mlflow).nth(2).locator(".barlayer")):
        expect(drawn.locator("path").first).to_be_visible()
    lines = cards(mlflow).nth(0).locator(".js-plotly-plot").evaluate(LINES)
    assert sorted(lines) == sorted([name, colour(name.split()[0])] for name in wide.names)
    expect(cards(mlflow).nth(2).locator(".barlayer .point")).to_have_count(len(wide.names))
    listed = mlflow.get_by_role("link", name=re.compile(r" alpha=\S+ s\d$"))
    expect(listed).to_have_count(len(wide.names))
    order = [name.split()[:2] for name in listed.all_inner_texts()]
    assert [alpha for _, alpha in order] == ["alpha=0.1"] * 6 + ["alpha=100"] * 6
    assert [len(list(same)) for _, same in itertools.groupby(order)] == [3, 3, 3, 3]  # the seeds of a setting together
    assert called.foreign == []


def test_a_sweeps_own_page_has_means_settings_and_its_table_whole(site, wide, mlflow, called):
    mlflow.goto(f"{site.mlflow}/{wide.parent}")
    for shown in ("choice/accuracy at alpha 0.1/svd", "fedit, svd", "fedlora sweep wide"):
        expect(mlflow.get_by_text(shown, exact=True).first).to_be_visible()
    note = mlflow.get_by_test_id("note-editor-preview-content")
    expect(note.get_by_role("link", name="report", exact=True)).to_be_in_viewport()  # without unfolding it
    mlflow.get_by_text("Show more", exact=True).click()
    boards = note.get_by_role("table")
    expect(boards).to_have_count(2)
    assert boards.first.evaluate("table => table.scrollWidth <= table.closest('[data-testid]').clientWidth")
    with mlflow.context.expect_page() as opened:
        note.get_by_role("link", name="report", exact=True).click()
    expect(opened.value.frame_locator("iframe").get_by_role("heading", name="Sweep wide")).to_be_visible()
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
    expect(opened.value.get_by_role("link", name="svd adapter", exact=True).last).to_be_visible()  # the run's model
    expect(opened.value.get_by_text("fedlora sweep", exact=True)).to_be_visible()  # its source
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


def test_each_condition_has_a_champion_that_says_in_words_what_it_is(site, wide, mlflow, called):
    for alpha in ("0.1", "100"):
        mlflow.goto(f"{site.mlflow}/#/models/fedlora-wide-alpha-{alpha}/versions/1")
        expect(mlflow.get_by_text("@ champion")).to_be_visible()
        expect(mlflow.get_by_text(re.compile(r"^Accuracy 0\.\d+ ± "))).to_be_visible()
    expect(mlflow.get_by_text('[["')).to_have_count(0)
    assert called.foreign == []
