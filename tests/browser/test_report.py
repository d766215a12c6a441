"""The HTML report of a finished sweep, opened as the file it is."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from fedlora.report.plots import colour

SHOWN = "plot => plot._fullData.filter(line => line.visible === true).map(line => [line.name, line.line.color])"


@pytest.fixture
def report(site, page) -> Page:
    page.goto((site.folder / "report" / "report.html").as_uri())
    expect(page.locator("html[data-ready]")).to_be_attached()
    return page


def test_a_strategy_is_switched_off_everywhere(site, report, called, errors):
    plots = [report.locator(f"#plot-{key}") for key in ("accuracy-rounds", "accuracy-megabytes", "rho-rounds")]
    every = {name: colour(name) for name in site.children}
    for plot in plots:
        assert every.items() <= dict(plot.evaluate(SHOWN)).items()
    report.get_by_role("checkbox", name="svd").uncheck()
    for plot in plots:
        expect(plot.locator(".legendtoggle").first).to_be_attached()
        left = dict(plot.evaluate(SHOWN))
        assert "svd" not in left
        assert {"fedit", "flora-na"} <= left.keys()
    report.get_by_role("checkbox", name="svd").check()
    assert "svd" in dict(plots[0].evaluate(SHOWN))
    assert errors == []
    assert called.foreign == []
    assert called.hosts == set()  # not even this machine: the page is one file


def test_the_verdict_comes_first_and_names_a_choice(report):
    first = report.locator("main section").first
    expect(first.get_by_role("heading", name="Verdict")).to_be_visible()
    expect(first.locator("p").first).to_contain_text("has the highest score, accuracy 0.")


def test_the_leaderboard_names_every_strategy_and_sorts(site, report, called):
    board = report.locator("#leaderboard table").first
    expect(board.locator("tbody tr")).to_have_count(len(site.children))
    for first in ("fedit", "svd"):  # words from A, then from Z
        board.get_by_role("button", name="choice").click()
        expect(board.locator("tbody tr").first).to_contain_text(first)
    assert called.hosts == set()


def test_it_fits_a_phone(report, called):
    report.set_viewport_size({"width": 390, "height": 844})
    report.reload()
    expect(report.locator("html[data-ready]")).to_be_attached()
    assert report.evaluate("document.documentElement.scrollWidth") <= 390
    assert called.hosts == set()
