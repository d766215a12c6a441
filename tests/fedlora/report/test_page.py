"""The page and its tables on disk; every figure is one that Plotly understands."""

import json
import re

import pandas as pd
import plotly.graph_objects as go
import pytest

from fedlora import report
from fedlora.errors import FedloraError, RunFolderError
from fedlora.report import curves, maps, page, plots
from fedlora.report.decision import decide


def figures(text):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, flags=re.S)[1])


def words(text):
    """The page without its scripts."""
    return re.sub(r"<script.*?</script>", "", text, flags=re.S)


@pytest.fixture(scope="module")
def written(comparison, tmp_path_factory):
    return report.write(comparison, tmp_path_factory.mktemp("report") / "new")


@pytest.fixture(scope="module")
def text(written):
    return written.read_text()


def test_a_page_and_its_tables(written, comparison):
    names = {path.name for path in written.parent.iterdir()}
    assert names == {"report.html", "verdict.json", *(f"{name}.csv" for name in report.TABLES)}
    assert len(pd.read_csv(written.parent / "runs.csv")) == 9
    assert len(pd.read_csv(written.parent / "rounds.csv")) == len(comparison.rounds)
    paired = pd.read_csv(written.parent / "paired.csv").set_index("choice")
    assert paired.loc["fedit", "difference"] == pytest.approx(-0.04)


def test_the_page_is_whole_and_asks_for_nothing(text):
    assert text.count("plotly.js v") == 1  # the library, once
    assert not re.search(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", words(text) + text[:5000])
    assert "default-src 'none'" in text
    assert '<meta name="viewport"' in text


def test_every_figure_is_valid_and_has_named_axes(text):
    found = figures(text)
    expected = {
        "final-accuracy",
        "accuracy-rounds",
        "accuracy-megabytes",
        "rho-rounds",
        "gap",
        "condition-R",
        "partition",
    }
    assert expected | {"layers-last", "layers-rounds", "rho-first", "rho-last"} <= set(found)
    for key, figure in found.items():
        go.Figure(figure)  # refuses unknown properties
        for axis in ("xaxis", "yaxis"):
            assert figure["layout"][axis]["title"]["text"] or key == "final-accuracy", key


def test_curves_hold_means_and_seeds_in_the_strategy_s_colour(comparison):
    figure = next(f for f in curves.all_curves(comparison) if f.key == "accuracy-rounds")
    mean, *seeds = (trace for trace in figure.traces if trace["meta"]["strategy"] == "fedit")
    assert mean["y"] == [pytest.approx(0.1), pytest.approx(0.33), pytest.approx(0.66)]
    assert mean["line"]["color"] == plots.colour("fedit")
    assert [seed["y"][-1] for seed in seeds] == [0.58, 0.66, 0.74]
    assert all(seed["showlegend"] is False for seed in seeds)


def test_megabytes_are_the_x_axis_of_their_figure(comparison):
    figure = next(f for f in curves.all_curves(comparison) if f.key == "accuracy-megabytes")
    assert figure.traces[0]["x"] == [0, 1, 2]


def test_what_is_rounding_is_not_drawn_on_a_logarithmic_axis(comparison):
    figure = next(f for f in curves.all_curves(comparison) if f.key == "condition-R")
    assert {trace["meta"]["strategy"] for trace in figure.traces} == {"svd", "fedit"}


def test_scaling_is_drawn_only_where_something_scales(make, comparison):
    assert curves.scaling(comparison) == []
    figure = next(f for f in curves.scaling(make(ranks=(4, 8))) if f.key == "scaling-rank-accuracy")
    svd = figure.traces[0]
    assert (svd["x"], svd["y"]) == ([4, 8], [pytest.approx(0.66), pytest.approx(0.7)])
    assert svd["error_y"]["array"][1] == pytest.approx(0.24841, abs=1e-4)


def test_layers_have_a_column_per_setting_and_a_choice_of_one(comparison):
    last, rounds = maps.layers(comparison)
    (heat,) = last.traces
    assert heat["x"] == ["svd", "fedit", "local"]
    assert heat["y"] == ["0.query", "1.query"]
    assert heat["z"][0] == [0.05, 0.2, 0.9]
    assert [column["strategy"] for column in heat["meta"]["columns"]] == heat["x"]
    assert rounds.choices == ["svd", "fedit", "local"]
    assert rounds.traces[1]["z"][0] == [0.4, 0.2]


LONG = [f"{strategy} clients={n} data.train_size=2000" for n in (2, 4, 10) for strategy in ("fedit", "flora-na", "svd")]


@pytest.mark.parametrize(
    ("labels", "wide", "turned"),
    [(["fedit", "svd"], False, False), (LONG[:3], True, False), (LONG, True, True), (LONG * 3, True, True)],
)
def test_labels_of_columns_have_room(labels, wide, turned):
    found = maps._Labels.of(labels)
    assert (found.wide, found.turned) == (wide, turned)
    assert [text.replace("<br>", " ") for text in found.texts] == labels
    lines = [text.split("<br>") for text in found.texts]
    longest = maps._SIGN_PX * max(len(line) for own in lines for line in own)
    across = maps._LINE_PX * max(map(len, lines)) if turned else longest
    assert across <= maps._WIDE_PX / len(labels)
    assert found.room >= (longest if turned else 60)


def test_the_map_grows_with_its_labels_and_its_colours_keep_their_length(make):
    clients = {f"a-strategy-with-a-long-name-{n}": {0: 0.5} for n in range(9)}
    last, rounds = maps.layers(make(clients))
    assert last.layout["xaxis"]["tickangle"] == -90
    assert last.height - maps._Labels.of(list(clients)).room == rounds.height


def test_a_setting_looks_the_same_in_every_figure(make):
    """Whatever the order in which a figure draws them; here the best has the last rank."""
    made = make({"svd": {0: 0.6}, "fedit": {0: 0.5}}, ranks=(2, 4, 8, 16))
    seen = {}
    for figure in figures(page.render(made, decide(made))).values():
        for trace in figure["data"]:
            if trace["type"] == "scatter" and "rest" in trace["meta"] and "symbol" in trace.get("marker", {}):
                look = trace["marker"]["color"], trace["marker"]["symbol"]
                seen.setdefault(trace["legendgroup"], set()).add(look)
    assert len(seen) == 8
    assert all(len(looks) == 1 for looks in seen.values())
    assert len(set.union(*seen.values())) == 8


def test_a_single_module_keeps_its_name():
    assert maps.short(["a.b"]) == {"a.b": "a.b"}
    assert maps.short(["a.b.c", "a.b"]) == {"a.b.c": "c", "a.b": "a.b"}


def test_the_partition_shows_nothing_as_a_gap(comparison):
    figure = maps.partitions(comparison)
    assert figure.traces[0]["z"][0] == [5, None]
    assert figure.choices[0] == "seed 0: iid, hash hash0"


def test_what_is_left_out_is_on_the_page_with_its_reason(text):
    assert "flora lora.ranks=[2, 4]" in text
    assert "not with mixed ranks" in text


EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'


def test_what_users_call_things_stays_text(make, tmp_path):
    made = make({"svd": {0: 0.6, 1: 0.62}, EVIL: {0: 0.5, 1: 0.51}})
    runs = made.runs.assign(name=EVIL, **{"data.name": EVIL})
    parts = {"hash0": {"labels": [EVIL, "b"], "label_counts": [[1, 2]], "partitioner": EVIL}}
    changes = {
        "title": EVIL,
        "note": EVIL,
        "runs": runs,
        "rounds": made.rounds,
        "modules": made.modules.assign(module=EVIL),
        "partitions": parts,
        "configs": {run: {EVIL: EVIL} for run in runs["run_id"]},
        "excluded": [report.Excluded(EVIL, EVIL, EVIL)],
    }
    evil = make(**changes)
    text = report.write(evil, tmp_path).read_text()
    assert text.count("</script>") == 3  # the library, the figures, the page's own
    assert "<img" not in words(text)
    assert "<script>alert" not in text
    found = figures(text)
    for figure in found.values():
        for trace in figure["data"]:
            trace.pop("meta")  # by which the page switches, never shown
    shown = json.dumps(found, ensure_ascii=False)
    assert "<img" not in shown
    assert "&lt;img src=x" in shown


def test_little_is_enough_for_a_page(make, tmp_path):
    bare = make({"svd": {0: 0.6}}, modules=pd.DataFrame(), partitions={}, configs={}, excluded=())
    bare.rounds.drop(columns=["rho/model", "rho/floor", "gap/accuracy", "bytes/total"], inplace=True)
    text = report.write(bare, tmp_path).read_text()
    assert set(figures(text)) == {"final-accuracy", "accuracy-rounds", "condition-R", "condition-P", "condition-Q"}
    assert (tmp_path / "modules.csv").read_text() == ""


def test_no_finished_run_is_one_line(make, tmp_path):
    nothing = make(runs=pd.DataFrame())
    with pytest.raises(FedloraError, match=r"no run has finished.*first: flora lora.ranks=\[2, 4\]: skipped, not with"):
        report.write(nothing, tmp_path)


def test_a_file_in_the_folder_s_place_is_one_line(comparison, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot write .*taken"):
        report.write(comparison, tmp_path / "taken")


def test_legends_are_left_to_the_page_where_figures_have_none(comparison):
    heat = maps.layers(comparison)[0]
    assert page._figure(heat)["layout"]["showlegend"] is False
