"""The page and its tables on disk; every figure is one that Plotly understands."""

import csv
import io
import json
import math
import re
from dataclasses import replace
from urllib.parse import unquote

import pandas as pd
import plotly.graph_objects as go
import pytest

from fedlora import report
from fedlora.errors import FedloraError, RunFolderError
from fedlora.report import boards, curves, figuredata, maps, page, plots, views
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
    figure = next(f for f in curves.all_curves(comparison, decide(comparison)) if f.key == "accuracy-rounds")
    mean, *seeds = (trace for trace in figure.traces if trace["meta"]["strategy"] == "fedit")
    assert mean["y"] == [pytest.approx(0.1), pytest.approx(0.33), pytest.approx(0.66)]
    assert mean["line"]["color"] == plots.colour("fedit")
    assert [seed["y"][-1] for seed in seeds] == [0.58, 0.66, 0.74]
    assert all(seed["showlegend"] is False for seed in seeds)


def test_megabytes_are_the_x_axis_of_their_figure(comparison):
    figure = next(f for f in curves.all_curves(comparison, decide(comparison)) if f.key == "accuracy-megabytes")
    assert figure.traces[0]["x"] == [0, 1, 2]


def test_what_is_rounding_is_not_drawn_on_a_logarithmic_axis(comparison):
    figure = next(f for f in curves.all_curves(comparison, decide(comparison)) if f.key == "condition-R")
    assert {trace["meta"]["strategy"] for trace in figure.traces} == {"svd", "fedit"}


def test_scaling_is_drawn_only_where_something_scales(make, comparison):
    assert curves.scaling(comparison) == []
    figure = next(f for f in curves.scaling(make(ranks=(4, 8))) if f.key == "scaling-rank-accuracy")
    svd = figure.traces[0]
    assert (svd["x"], svd["y"]) == ([4, 8], [pytest.approx(0.66), pytest.approx(0.7)])
    assert svd["error_y"]["array"][1] == pytest.approx(0.24841, abs=1e-4)


def test_layers_have_a_column_per_setting_and_a_choice_of_one(comparison):
    last, rounds = maps.layers(comparison, decide(comparison))
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
    made = make(clients)
    last, rounds = maps.layers(made, decide(made))
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


def twice(make, **changes):
    """The made-up comparison under two conditions; the second a tenth lower."""
    first, second = make(**changes), make(**changes)
    second.runs["final/accuracy"] -= 0.1
    parts = []
    for part, alpha in ((first, 0.1), (second, 100.0)):
        tables = part.runs.assign(**{"partition.alpha": alpha}), part.rounds, part.modules
        parts.append([table.assign(run_id=table["run_id"] + f"@{alpha}") for table in tables])
    runs, rounds, modules = (pd.concat(each, ignore_index=True) for each in zip(*parts, strict=True))
    return make(runs=runs, rounds=rounds, modules=modules)


def test_many_conditions_are_panels_with_one_look_a_choice(make):
    made = twice(make)
    text = page.render(made, decide(made))
    for key in ("final-accuracy", "accuracy-rounds", "accuracy-megabytes", "rho-rounds", "rho-first", "gap"):
        figure = figures(text)[key]
        assert figure["layout"]["meta"]["panels"] == ["partition.alpha=0.1", "partition.alpha=100"]
        looks = {}
        for trace in figure["data"]:
            assert trace.get("xaxis", "x") == ("x", "x2")[trace["meta"]["panel"]]
            looks.setdefault(trace["legendgroup"], set()).add(trace["marker"]["symbol"])
        assert looks.keys() == {"svd", "fedit", "local"}  # in words that name no condition
        assert all(len(each) == 1 for each in looks.values())
    shown = words(text)
    assert shown.count('<option value="1">partition.alpha=100</option>') == 1
    assert shown.count('<div data-condition="1">') == 2  # leaderboard, budgets
    assert len(re.findall(r'<tr data-condition="1">', shown)) == 3  # costs of three choices


def test_one_condition_has_no_panels_and_nothing_to_pick(text):
    assert "meta" not in figures(text)["accuracy-rounds"]["layout"]
    assert 'id="condition"' not in words(text)


def test_the_subtitle_is_in_words(make, comparison):
    assert views.subtitle(comparison, decide(comparison)) == (
        "2 choices (svd, fedit) beside local as controls: 9 runs, 3 seeds. 4 clients, rank 8."
    )
    made = twice(make)
    assert ", under 2 conditions (partition.alpha 0.1, 100): 18 runs" in views.subtitle(made, decide(made))


def table_of(figure):
    address = figuredata.link(figure)
    assert address.startswith("data:text/csv;charset=utf-8,")
    return list(csv.DictReader(io.StringIO(unquote(address.split(",", 1)[1]))))


def test_the_data_of_a_line_is_a_row_per_point(make):
    made = twice(make)
    figure = next(f for f in curves.all_curves(made, decide(made)) if f.key == "accuracy-megabytes")
    rows = table_of(figure)
    assert len(rows) == 2 * 3 * 4 * 3  # conditions, choices, mean and seeds, rounds
    last = [r for r in rows if (r["choice"], r["round"], r["condition"]) == ("fedit", "2", "partition.alpha=0.1")]
    assert [(row["of"], float(row["test accuracy (share)"])) for row in last] == [
        ("mean of 3 seeds", pytest.approx(0.66)), ("seed 0", 0.58), ("seed 1", 0.66), ("seed 2", 0.74)
    ]  # fmt: skip
    assert {row["sent so far (MB)"] for row in last} == {"2.0"}


def test_the_data_of_an_interval_has_its_ends_and_that_of_a_map_its_cells(comparison):
    decided = decide(comparison)
    svd = table_of(maps.final_scores(decided))[0]
    score = decided.conditions[0].best.score
    assert {key: svd[key] for key in ("choice", "of")} == {"choice": "svd", "of": "mean of 3 seeds"}
    numbers = [float(svd[key]) for key in ("final test accuracy (share)", "low", "high")]
    assert numbers == pytest.approx([score.mean, score.low, score.high], abs=1e-5)
    (first, *_) = table_of(maps.layers(comparison, decided)[0])
    assert first == {"module": "0.query", "svd": "0.05", "fedit": "0.2", "local": "0.9"}
    assert table_of(maps.partitions(comparison))[0]["b"] == ""  # nobody has it


def test_every_figure_has_its_data_and_pictures_to_take(text):
    shown = words(text)
    assert len(figures(text)) > 10
    for key in figures(text):
        assert re.search(rf'<a href="data:text/csv[^"]+" download="{key}.csv">data</a>', shown), key
    assert shown.count('data-take="svg"') == shown.count('data-take="png"') == len(figures(text))


def test_the_data_holds_what_users_wrote(make):
    made = make({"a<b&c": {0: 0.5}})
    assert table_of(maps.final_scores(decide(made)))[0]["choice"] == "a<b&c"


def test_the_second_view_is_hidden_until_asked_for_and_in_the_csv(make, written):
    clients = pd.DataFrame(
        [
            {"run_id": f"svd-8-{seed}", "round": number, "client": client, "accuracy": number * (seed + client) / 20}
            for seed in range(3)
            for number in (1, 2)
            for client in range(4)
        ]
    )
    (condition,) = decide(make(clients=clients)).conditions
    svd, fedit = condition.standings
    assert svd.clients.mean == pytest.approx(0.25)  # (seed + client) / 10 in the last round: 1.5 / 10 to 3.5 / 10
    assert svd.clients.low < 0.2 < 0.3 < svd.clients.high
    assert svd.redrawn.mean == svd.score.mean
    assert svd.score.low < svd.redrawn.low < svd.redrawn.high < svd.score.high  # too narrow with three seeds
    assert math.isnan(fedit.clients.mean)
    board = boards.leaderboard(condition)
    looks = {title: board.look(column) for column, title in enumerate(board.titles)}
    assert {looks[title] for title in boards.second_view(condition)} == {"off"}
    assert [title for title, look in looks.items() if not look] == ["choice", "accuracy", "MB"]  # on a phone
    assert not set(boards.second_view(condition)) & set(board.shown.titles)
    assert len(board.shown.rows[0]) == len(board.shown.titles)
    columns = pd.read_csv(written.parent / "leaderboard.csv").set_index("choice").loc["svd"]
    assert columns["accuracy_bootstrap_low"] == pytest.approx(0.6, abs=0.02)


def test_of_very_many_conditions_the_scores_in_each_wait_to_be_asked_for(make):
    decided = decide(make())
    (condition,) = decided.conditions
    many = type(decided)([condition] * 9, decided.overall, decided.choices, decided.world)
    assert boards.across(decided).hidden == ()
    assert len(set(boards.across(many).hidden)) == 1


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
            trace.pop("meta", None)  # by which the page switches, never shown
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
    heat = maps.layers(comparison, decide(comparison))[0]
    assert page._figure(heat)["layout"]["showlegend"] is False


def test_layers_stand_in_the_order_of_their_numbers(make, comparison):
    names = [f"model.layers.{layer}.self_attn.{which}" for layer in (0, 1, 2, 10, 29) for which in ("q_proj", "v_proj")]
    rows = [{"run_id": "svd-8-0", "round": 2, "module": name, "rho": 0.1} for name in sorted(names)]
    told = replace(comparison, modules=pd.DataFrame(rows))
    figure = maps.layers(told, decide(told))[0]
    shown = figure.layout["yaxis"]["categoryarray"]
    expected = [name.removeprefix("model.layers.") for name in names]
    assert list(shown) in (expected, expected[::-1])
