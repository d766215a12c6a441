"""What a finished run leaves behind: tables, cards and pictures."""

import contextlib
import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from peft import PeftModel

import fedlora
from fedlora.adapter import Adapter
from fedlora.config import ModelConfig, configfile
from fedlora.data import tokens
from fedlora.errors import AdapterError
from fedlora.exchange.peftfolder import read_peft_folder
from fedlora.model import base as model
from fedlora.objective.classification import ACCURACY, OBJECTIVE, Confusion
from fedlora.report import plots
from fedlora.run import export, rounds
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder

CLIENTS = {"round", "client", "examples", "rank", "loss", "accuracy", "seconds", "bytes", "status"}
DIVERGENCE = {"round", "module", "rho", "floor"}
"""The columns that DESIGN.md promises."""


def table(folder, name) -> list[dict]:
    return json.loads((folder / "tables" / f"{name}.json").read_text())


def scored(network, tokenizer, folder, batch_size=64):
    """A model's scores on the test rows of a run, with the padding of its own tokenizer."""
    setup = json.loads((folder / "setup.json").read_text())
    data = tokens.open_tokens(Path(setup["tokens"]))
    examples = tokens.examples(data.test, np.arange(len(data.test)))
    padding = tokens.Padding(tokenizer.pad_token_id, tokenizer.padding_side)
    stand_in = SimpleNamespace(
        peft=network, device=torch.device("cpu"), autocast=contextlib.nullcontext, labels=data.labels
    )
    return OBJECTIVE.evaluate(stand_in, examples, batch_size, padding)


def measured(folder) -> list[dict]:
    return [dict(record.metrics) for record in rounds.records(RunFolder(folder))]


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
        assert row["accuracy"] == Confusion.from_json(record["local"]).accuracy
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


def test_of_very_many_clients_some_rounds_are_left_out_of_the_table(finished, as_new, tmp_path, monkeypatch):
    run = as_new(finished({"rounds": 5, "clients": 2, "keep_rounds": None}), tmp_path / "run")
    for most, kept in ((10, [1, 2, 3, 4, 5]), (6, [1, 3, 5]), (1, [1, 5])):
        monkeypatch.setattr(export, "LONGEST_TABLE", most)
        export.final(run)
        rows = run.read_json("tables/clients.json")
        assert [row["round"] for row in rows] == [number for number in kept for _ in range(2)]
        assert {row["round"] for row in run.read_json("tables/divergence.json")} == {1, 2, 3, 4, 5}


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


def test_pictures_are_drawn(pictures, configure, tmp_path):
    train(configure(), tmp_path / "run")
    figures = tmp_path / "run" / "figures"
    for name in ("rounds", "partition"):
        pixels = imread(figures / f"{name}.png")
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20
    assert has_colour(figures / "rounds.png", plots.colour("fedit")) > 100
    assert has_colour(figures / "rounds.png", plots.colour("svd")) == 0


def test_each_strategy_has_a_colour_of_its_own_and_unknown_ones_a_fixed_one():
    builtin = [plots.colour(name) for name in ("fedit", "ffa-lora", "flora-na", "svd", "local")]
    assert len(set(builtin)) == 5
    assert plots.colour("from-a-plug-in") == plots.colour("from-a-plug-in") not in builtin


def test_a_run_without_a_metric_leaves_its_line_out(pictures, finished, tmp_path):
    records = rounds.records(RunFolder(finished({"rounds": 3, "evaluation.every": 2})))
    plots.rounds_figure({"a": records}, tmp_path / "deep" / "a.png", ACCURACY, {"a": "#ff0000"}, "A title")
    plots.rounds_figure({"a": records[:1]}, tmp_path / "b.png", ACCURACY, {"a": "#ff0000"})
    assert has_colour(tmp_path / "deep/a.png", "#ff0000") > has_colour(tmp_path / "b.png", "#ff0000")


# -- the adapter in use


def test_the_adapter_folder_gives_the_last_accuracy_in_plain_peft_and_in_fedlora(finished):
    folder = finished({"training.local_steps": 30})
    expected = measured(folder)[-1]
    labels = json.loads((folder / "setup.json").read_text())["labels"]
    base = fedlora.load_base("bert-tiny", labels=len(labels))
    tokenizer = model.load_tokenizer(ModelConfig())
    plain = scored(PeftModel.from_pretrained(base, str(folder / "adapter")).eval(), tokenizer, folder)
    ours, tokenizer, names = fedlora.load_adapter(folder / "adapter")
    assert names == labels
    for scores in (plain, scored(ours, tokenizer, folder)):
        assert scores.accuracy == expected["global/accuracy"]
        assert scores.macro_f1 == expected["global/macro_f1"]
        assert scores.loss == expected["global/loss"]
    untrained = scored(fedlora.load_base("bert-tiny", labels=labels), tokenizer, folder)
    assert untrained.accuracy < expected["global/accuracy"]


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "hira"])
def test_the_folder_of_every_variant_is_the_global_model_in_plain_peft(finished, variant):
    """With clients of several ranks: the folder is at the highest, with the alpha that keeps the scaling."""
    folder = finished({"strategy": "zero-padding", "lora.ranks": [2, 4, 7], "lora.variant": variant})
    labels = json.loads((folder / "setup.json").read_text())["labels"]
    plain = PeftModel.from_pretrained(fedlora.load_base("bert-tiny", labels), str(folder / "adapter")).eval()
    scores = scored(plain, model.load_tokenizer(ModelConfig()), folder)
    assert scores.loss == pytest.approx(measured(folder)[-1]["global/loss"], rel=1e-6)
    written = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert written["r"] == 7
    if variant != "hira":
        assert written["lora_alpha"] == pytest.approx(2 * 7 if variant != "rslora" else 16 / 8**0.5 * 7**0.5)


@pytest.mark.parametrize("strategy", ["flora", "oracle", "fed-sb"])
def test_what_is_not_in_the_factors_comes_along(finished, strategy):
    """A base update, or a core between the factors."""
    folder = finished({"strategy": strategy})
    network, tokenizer, _ = fedlora.load_adapter(folder / "adapter")
    scores = scored(network, tokenizer, folder)
    assert scores.loss == pytest.approx(measured(folder)[-1]["global/loss"], rel=1e-5)


def test_a_loaded_adapter_names_the_class_of_a_sentence(finished):
    network, tokenizer, labels = fedlora.load_adapter(finished({"training.local_steps": 30}) / "adapter")
    inputs = tokenizer(["a small carnivorous mammal", "the act of selling"], padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        chosen = network(**inputs).logits.argmax(-1)
    assert all(0 <= index < len(labels) for index in chosen)
    assert not network.training


def test_an_adapter_from_elsewhere_is_refused_with_what_to_do(finished, tmp_path):
    shutil.copytree(finished() / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter/fedlora.json").unlink()
    with pytest.raises(AdapterError, match=r"no readable fedlora.json .*PeftModel.from_pretrained"):
        fedlora.load_adapter(tmp_path / "adapter")


def test_local_leaves_a_folder_for_each_client(finished):
    folder = finished({"strategy": "local"}) / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == ["client-000", "client-001", "client-002"]
    run = RunFolder(finished({"strategy": "local"}))
    for number in range(3):
        own = read_peft_folder(folder / f"client-{number:03d}")
        trained = Adapter.from_tensors(run.read_tensors(run.client_stem(2, number)))
        assert all(torch.equal(t, trained.tensors()[name]) for name, t in own.tensors().items())
    network, _, _ = fedlora.load_adapter(folder / "client-001")
    assert network.peft_config["default"].r == 8


def test_a_file_with_natural_clients_end_to_end(tmp_path):
    words = {"animal": "cat dog hen", "plant": "oak fern rose"}
    with (tmp_path / "farm.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["note", "kind", "farm"])
        for i in range(160):
            kind = "animal" if i % 2 else "plant"
            writer.writerow([f"{words[kind].split()[i % 3]} number {i}", kind, f"farm {i % 8 // 2}"])
    overrides = {"data.name": str(tmp_path / "farm.csv"), "data.text": "note", "data.label": "kind"}
    overrides |= {"data.client": "farm", "data.max_length": 16, "partition.name": "natural-id", "clients": 4}
    overrides |= {"rounds": 1, "training.local_steps": 12, "training.batch_size": 8, "runner.kind": "threads"}
    config = configfile.build({**overrides, "runner.device": "cpu"})
    train(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run/partition.json").read_text())
    assert sum(summary["sizes"]) == 128
    assert summary["clients"] == 4
    assert measured(tmp_path / "run")[-1]["global/accuracy"] > 0.9
    assert fedlora.load_adapter(tmp_path / "run/adapter")[2] == ["animal", "plant"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "lora, rank 8, alpha 16"),
        ({"lora.ranks": [4, 16], "clients": 2}, "lora, rank 16, alpha 32, clients of several ranks"),
        ({"lora.variant": "hira"}, "hira, rank 8"),
    ],
)
def test_the_card_names_what_is_in_the_file(settings, words):
    config = configfile.build({"strategy": "svd", **settings})
    stored = {"r": config.lora.highest_rank}
    if config.lora.variant != "hira":
        stored["lora_alpha"] = config.lora.alpha_at(config.lora.highest_rank)
    assert export._kind(config, stored) == words
