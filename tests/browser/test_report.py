"""The HTML report of a finished sweep, opened as the file it is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Page, expect

from fedlora.report import write
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


WIDER = """() => [...document.querySelectorAll(".scroll")]
    .filter(box => box.offsetParent && box.scrollWidth > box.clientWidth + 1)
    .map(box => box.innerText)"""
"""Tables that are wider than the page."""
TITLES = "table => [...table.querySelectorAll('thead th')].filter(th => th.offsetParent).map(th => th.innerText)"


@pytest.mark.parametrize(("width", "titles"), [(1440, 13), (390, 3)])
def test_it_fits_a_screen_and_a_phone(report, called, width, titles):
    report.set_viewport_size({"width": width, "height": 900})
    report.reload()
    expect(report.locator("html[data-ready]")).to_be_attached()
    assert report.evaluate("document.documentElement.scrollWidth") <= width
    assert report.evaluate(WIDER) == []
    shown = report.locator("#leaderboard table").first.evaluate(TITLES)
    assert len(shown) == titles
    assert {"choice", "accuracy", "MB"} <= set(shown)
    assert called.hosts == set()


def test_columns_are_hidden_and_shown_and_stay_so(report):
    board = report.locator("#leaderboard table").first
    menu = report.locator("#leaderboard .columns").first
    menu.locator("summary").click()
    menu.get_by_label("server s").uncheck()
    menu.get_by_label("accuracy, bootstrap", exact=True).check()
    report.reload()
    shown = board.evaluate(TITLES)
    assert "server s" not in shown
    assert "accuracy, bootstrap" in shown
    # Both memories, the bootstrap over clients, and the one of above.
    expect(menu.locator("summary")).to_have_text("columns (4 hidden)")
    report.evaluate("localStorage.clear()")


def test_a_figure_is_taken_away_as_data_and_as_pictures(report, called, tmp_path):
    figure = report.locator("figure:has(#plot-accuracy-rounds)")
    begins = {"data": b"choice,of,round,test accuracy (share)\n", "PNG": b"\x89PNG", "SVG": b"<svg"}
    for words, first in begins.items():
        with report.expect_download() as download:
            figure.get_by_text(words, exact=True).click()
        end = {"data": "csv"}.get(words, words.lower())
        assert download.value.suggested_filename == f"accuracy-rounds.{end}"
        content = Path(download.value.path()).read_bytes()
        assert content.startswith(first)
        assert len(content) > 200
    assert called.hosts == set()


def test_it_prints_on_a4(report):
    content = report.pdf(format="A4")
    width, height = map(float, re.search(rb"/MediaBox\s*\[0 0 ([\d.]+) ([\d.]+)\]", content).groups())
    assert (round(width / 72 * 25.4), round(height / 72 * 25.4)) == (210, 297)
    wide = "plots => plots.map(plot => plot._fullLayout.width)"
    report.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert set(report.locator(".plot").evaluate_all(wide)) == {680}


@pytest.fixture
def many(page, tmp_path) -> Page:
    """The report of a made-up comparison under nine conditions."""
    spec = importlib.util.spec_from_file_location("made_up", Path(__file__).parents[1] / "fedlora/report/conftest.py")
    made_up = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made_up)
    tables = []
    for alpha in range(1, 10):
        part = made_up.build()
        runs = part.runs.assign(**{"partition.alpha": alpha})
        tables.append([each.assign(run_id=each["run_id"] + f"@{alpha}") for each in (runs, part.rounds, part.modules)])
    runs, rounds, modules = (pd.concat(each, ignore_index=True) for each in zip(*tables, strict=True))
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(write(made_up.build(runs=runs, rounds=rounds, modules=modules), tmp_path).as_uri())
    expect(page.locator("html[data-ready]")).to_be_attached()
    return page


def test_many_conditions_are_side_by_side_or_one_alone(many, errors):
    plot, boards = many.locator("#plot-accuracy-rounds"), many.locator("#leaderboard table[data-kind=leaderboard]")
    panels, named = "plot => plot._fullLayout._subplots.cartesian.length", ".legendtoggle"
    assert plot.evaluate(panels) == 9
    expect(plot.locator(named)).to_have_count(3)  # a choice each, not each in nine conditions
    expect(boards.filter(visible=True)).to_have_count(9)
    many.locator("#condition").select_option("partition.alpha=4")
    expect(boards.filter(visible=True)).to_have_count(1)
    many.wait_for_function(
        "document.getElementById('plot-accuracy-rounds')._fullLayout._subplots.cartesian.length === 1"
    )
    assert len(dict(plot.evaluate(SHOWN))) == 3
    assert many.evaluate("document.documentElement.scrollWidth") <= 1440
    assert many.evaluate(WIDER) == []
    assert errors == []
