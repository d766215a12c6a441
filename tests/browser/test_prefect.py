"""What a finished sweep and a deployment look like in Prefect's pages."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Locator, Page, expect

from deployments.form import AS_IN_PRESET
from deployments.shipped import PRESETS
from fedlora.strategies import registry
from mlflow_tracking import store

ASKED_ANYWAY = "sr-client-cfg.amplitude.com"
"""Prefect's second UI asks there how to count visits even with server.analytics_enabled off; it then counts none."""


def assert_private(called) -> None:
    assert {urlsplit(url).hostname for url in called.foreign} <= {ASKED_ANYWAY}


def tab(page: Page, name: str) -> None:
    page.get_by_role("tablist").get_by_text(name, exact=True).click()


def test_the_address_that_up_prints_shows_the_workers(site, page, called):
    page.goto(site.prefect)
    expect(page.get_by_text("cpu-workers").first).to_be_visible()
    assert_private(called)


def test_a_run_shows_its_rounds_and_clients(site, page, called):
    page.goto(f"{site.prefect}/runs/flow-run/{site.federated_runs['svd']}")
    expect(page.get_by_text("Completed").first).to_be_visible()
    expect(page.get_by_role("link", name="sweep seen")).to_be_visible()
    tab(page, "Task Runs")
    for words, name in (("round 2 client", re.compile(r"round 2 clients? .*fine-tune")), ("round 2 aggregate",) * 2):
        page.get_by_placeholder("Search by run name").fill(words)
        expect(page.get_by_role("link", name=name).first).to_be_visible()
    assert_private(called)


def test_a_runs_summary_leads_to_mlflow(site, page, called):
    page.goto(f"{site.prefect}/runs/flow-run/{site.federated_runs['svd']}")
    tab(page, "Artifacts")
    page.get_by_role("link", name="federated-summary").click()
    expect(page.get_by_role("heading", name="svd on wordnet-nouns")).to_be_visible()
    expect(page.get_by_role("table").get_by_role("row")).to_have_count(1 + 3)  # titles, before training, two rounds
    expect(page.get_by_role("link", name="MLflow run")).to_have_attribute(
        "href", f"{site.mlflow}/{store.run_page(site.experiment, site.children['svd'])}"
    )
    assert_private(called)


def test_a_sweep_shows_its_runs_and_leaderboard(site, page, called):
    page.goto(f"{site.prefect}/runs/flow-run/{site.sweep_run}")
    tab(page, "Subflow Runs")
    for strategy in site.children:
        expect(page.get_by_role("link", name=strategy, exact=True)).to_be_visible()
    tab(page, "Artifacts")
    page.get_by_role("link", name="sweep-summary").click()
    expect(page.get_by_role("heading", name="Sweep seen")).to_be_visible()
    expect(page.get_by_role("table").get_by_role("row")).to_have_count(1 + len(site.children))
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="report", exact=True).click()
    expect(opened.value.frame_locator("iframe").get_by_role("heading", name="Sweep seen")).to_be_visible()
    assert_private(called)


def test_the_address_of_the_forms_that_up_prints_lists_the_deployments(site, page, called):
    page.goto(f"{site.prefect}/v2/deployments")
    page.get_by_role("link", name="custom", exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    expect(page.get_by_text("Where the settings come from")).to_be_visible()
    assert_private(called)


@pytest.mark.parametrize(("ui", "opened_by"), [("", "keyboard"), ("v2/", "mouse")])
def test_the_form_offers_choices_and_says_what_they_mean(site, page, called, ui, opened_by):
    """The first UI's lists close again at once under a mouse (Prefect 3.8.8)."""
    page.goto(f"{site.prefect}/{ui}deployments/deployment/{site.deployment('federated/custom')}/run")
    for help_text in ("Where the settings come from", "How the server combines and broadcasts adapters", "Rank r of"):
        expect(page.get_by_text(help_text)).to_be_visible()
    expect(page.get_by_text("Property is type")).to_be_hidden()
    choice = page.get_by_role("button").filter(has_text=AS_IN_PRESET).first
    preset = page.get_by_role("button").filter(has_text=re.compile("^demo$"))

    def unfold(button: Locator) -> None:
        button.press("Space") if opened_by == "keyboard" else button.click()

    unfold(preset)
    for file in PRESETS.glob("*.yaml"):
        expect(page.get_by_text(file.stem, exact=True).last).to_be_visible()
    page.keyboard.press("Escape")
    unfold(choice)
    for name in ("fedit", "svd", "flora-na"):
        assert name in registry.names()
        expect(page.get_by_text(name, exact=True)).to_be_visible()
    page.get_by_text("flora-na", exact=True).click()
    expect(page.get_by_role("button").filter(has_text="flora-na")).to_be_visible()
    expect(page.get_by_text("fedit", exact=True)).to_be_hidden()  # folded again
    assert_private(called)
