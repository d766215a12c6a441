"""What a finished run leaves behind: tables, cards and pictures."""

import json
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from fedlora import export, plots, rounds
from fedlora.adapter import read_peft_folder
from fedlora.evaluation import Scores
from fedlora.runfolder import RunFolder

CLIENTS = {"round", "client", "examples", "rank", "loss", "accuracy", "seconds", "bytes", "status"}
DIVERGENCE = {"round", "module", "rho", "floor"}
"""The columns that DESIGN.md promises."""


def table(folder, name) -> list[dict]:
    return json.loads((folder / "tables" / f"{name}.json").read_text())


def has_colour(path, colour) -> int:
    """Pixels of exactly this colour."""
    pixels = imread(path)[..., :3]
    return int((np.abs(pixels - np.array(to_rgb(colour))) < 1.5 / 255).all(-1).sum())


def test_a_row_for_each_round_and_client(finished):
    rows = table(finished(), "clients")
    assert all(row.keys() >= CLIENTS for row in rows)
    assert [(row["round"], row["client"]) for row in rows] == [(r, c) for r in (1, 2) for c in (0, 1, 2)]
    sizes = json.loads((finished() / "partition.json").read_text())["sizes"]
    run = RunFolder(finished())
    for row in rows:
        record = run.read_record(run.client_stem(row["round"], row["client"]))
        assert row["examples"] == sizes[row["client"]]
        assert (row["rank"], row["status"]) == (8, "completed")
        assert row["loss_first"] == record["losses"][0]
        assert row["loss"] == pytest.approx(np.mean(record["losses"]))  # two steps
        assert row["accuracy"] == Scores.from_json(record["local"]).accuracy
        assert row["seconds"] == record["seconds"] > 0


def test_bytes_of_the_clients_are_those_of_the_rounds(finished):
    rows, records = table(finished(), "clients"), rounds.records(RunFolder(finished()))
    for number in (1, 2):
        mine = [row for row in rows if row["round"] == number]
        metrics = records[number].metrics
        assert sum(row["bytes_up"] for row in mine) == metrics["bytes/up_adapter"] + metrics["bytes/up_head"]
        assert sum(row["bytes_down"] for row in mine) == metrics["bytes/down_adapter"] + metrics["bytes/down_head"]
        assert all(row["bytes"] == row["bytes_up"] + row["bytes_down"] for row in mine)
    assert sum(row["bytes"] for row in rows) == records[-1].metrics["bytes/total"]


def test_no_accuracy_where_none_was_measured(finished):
    assert {row["accuracy"] for row in table(finished({"evaluation.local": False}), "clients")} == {None}


def test_only_those_who_took_part_are_in_the_table(finished):
    folder = finished({"clients": 6, "fraction": 0.5, "rounds": 4, "training.local_steps": 1})
    expected = [(r.round, c) for r in rounds.records(RunFolder(folder)) for c in r.clients]
    assert [(row["round"], row["client"]) for row in table(folder, "clients")] == expected


def test_a_row_for_each_round_and_module(finished):
    rows = table(finished(), "divergence")
    assert all(row.keys() >= DIVERGENCE for row in rows)
    modules = RunFolder(finished()).read_state(0).adapter.modules
    assert len(modules) == 4  # query and value of two layers
    assert [(row["round"], row["module"]) for row in rows] == [(r, m) for r in (1, 2) for m in modules]
    for row in rows:
        assert row["rho"] >= row["floor"] > 0
        assert row["excess"] == pytest.approx(row["rho"] - row["floor"])


def test_the_card_says_what_it_is_and_what_it_scored(finished):
    card = (finished({"strategy": "svd"}) / "adapter" / "README.md").read_text()
    accuracy = rounds.records(RunFolder(finished({"strategy": "svd"})))[-1].metrics["global/accuracy"]
    assert "svd on wordnet-nouns, round 2 of 2" in card
    assert f"| global/accuracy | {accuracy:.4f} |" in card
    assert re.search(r"^---\nlibrary_name: peft\nbase_model: bert-tiny\ntags: \[lora, federated, svd\]\n---\n", card)
    assert 'fedlora.load_base("bert-tiny", labels=20)' in card


def test_the_adapter_of_an_earlier_round(finished, tmp_path):
    run = RunFolder(finished())
    export.adapter(run, 1, tmp_path / "adapter")
    found, expected = read_peft_folder(tmp_path / "adapter"), run.read_state(1).adapter
    assert all((t == expected.tensors()[name]).all() for name, t in found.tensors().items())
    assert json.loads((tmp_path / "adapter/fedlora.json").read_text())["round"] == 1
    assert "round 1 of 2" in (tmp_path / "adapter/README.md").read_text()


def test_pictures_are_drawn(finished):
    for name in ("rounds", "partition"):
        pixels = imread(finished() / "figures" / f"{name}.png")
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20
    assert has_colour(finished() / "figures/rounds.png", plots.colour("fedit")) > 100
    assert has_colour(finished() / "figures/rounds.png", plots.colour("svd")) == 0


def test_each_strategy_has_a_colour_of_its_own_and_unknown_ones_a_fixed_one():
    builtin = [plots.colour(name) for name in ("fedit", "ffa-lora", "flora-na", "svd", "local")]
    assert len(set(builtin)) == 5
    assert plots.colour("from-a-plug-in") == plots.colour("from-a-plug-in") not in builtin


def test_a_run_without_a_metric_leaves_its_line_out(finished, tmp_path):
    records = rounds.records(RunFolder(finished({"rounds": 3, "evaluation.every": 2})))
    plots.rounds_figure({"a": records}, tmp_path / "deep" / "a.png", {"a": "#ff0000"}, "A title")
    plots.rounds_figure({"a": records[:1]}, tmp_path / "b.png", {"a": "#ff0000"})
    assert has_colour(tmp_path / "deep/a.png", "#ff0000") > has_colour(tmp_path / "b.png", "#ff0000")
