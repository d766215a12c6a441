"""Whole federated runs, tiny but real: what they measure, and what comes out of them."""

import contextlib
import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, GPT2Config, LlamaConfig

import fedlora
from fedlora import client, configfile, model, rounds
from fedlora.adapter import Adapter, read_peft_folder
from fedlora.config import ModelConfig
from fedlora.data import tokens
from fedlora.data.partition import Partition
from fedlora.errors import AdapterError, ModelError
from fedlora.evaluation import evaluate
from fedlora.loop import train
from fedlora.runfolder import RunFolder
from fedlora.strategies import registry

STRATEGIES = ("fedit", "ffa-lora", "flora-na", "svd", "local")
ALWAYS = {"bytes/up_adapter", "bytes/up_head", "bytes/down_adapter", "bytes/down_head", "bytes/down_base"} | {
    *("bytes/total", "time/train_s", "time/aggregate_s", "time/evaluate_s", "time/round_s")
}
TRAINED = {"rho/model", "rho/floor", "rho/excess", "rho/effective_clients", "abo/R", "abo/P", "abo/Q"} | {
    *("abo/dispersion", "clients/selected", "clients/completed")
}
GLOBAL = {"global/accuracy", "global/loss", "global/macro_f1"}
LOCAL = {"local/accuracy", "local/accuracy_p10", "local/accuracy_worst"}


def measured(folder) -> list[dict]:
    return [dict(record.metrics) for record in rounds.records(RunFolder(folder))]


def scored(network, tokenizer, folder, batch_size=64):
    """A model's scores on the test rows of a run, with the padding of its own tokenizer."""
    setup = json.loads((folder / "setup.json").read_text())
    data = tokens.open_tokens(Path(setup["tokens"]))
    examples = tokens.examples(data.test, np.arange(len(data.test)))
    stand_in = SimpleNamespace(peft=network, device=torch.device("cpu"), autocast=contextlib.nullcontext)
    return evaluate(stand_in, examples, len(data.labels), batch_size, tokenizer.pad_token_id, tokenizer.padding_side)


# -- what is measured


def test_the_metrics_are_those_of_the_design(finished):
    before, *trained = measured(finished())
    assert before.keys() == ALWAYS | GLOBAL | LOCAL | {"gap/accuracy"}
    assert len(trained) == 2
    for values in trained:
        assert values.keys() == ALWAYS | GLOBAL | LOCAL | TRAINED | {"gap/accuracy"}
        assert values["gap/accuracy"] == pytest.approx(values["local/accuracy"] - values["global/accuracy"])
        assert values["clients/selected"] == values["clients/completed"] == 3
        assert 0 <= values["rho/floor"] <= values["rho/model"] < 1
        assert values["time/round_s"] >= values["time/train_s"] + values["time/aggregate_s"] > 0


def test_bytes_add_up_over_rounds_and_are_those_of_the_files(finished):
    before, first, second = measured(finished())
    assert before["bytes/total"] == 0
    kinds = [key for key in ALWAYS if key.startswith("bytes/") and key != "bytes/total"]
    assert first["bytes/total"] == sum(first[kind] for kind in kinds) > 0
    assert second["bytes/total"] == first["bytes/total"] + sum(second[kind] for kind in kinds)
    shapes = json.loads((finished() / "rounds/000/state.json").read_text())
    factors = 4 * shapes["adapter_parameters"] * 3  # fp32, three clients; the rest is names
    assert factors < first["bytes/up_adapter"] < factors * 1.1


def test_training_learns(finished):
    values = measured(finished({"training.local_steps": 30}))
    assert values[-1]["global/accuracy"] > values[0]["global/accuracy"] + 0.05
    assert values[-1]["global/loss"] < values[0]["global/loss"] - 0.2


def test_the_report_sees_every_round_once(configure, tmp_path):
    seen = []
    records = train(configure({"rounds": 1}), tmp_path / "run", seen.append)
    assert [record.round for record in seen] == [0, 1]
    assert records == seen


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_runs_with_a_sensible_divergence(finished, strategy):
    rho = [values["rho/model"] for values in measured(finished({"strategy": strategy}))[1:]]
    floor = [values["rho/floor"] for values in measured(finished({"strategy": strategy}))[1:]]
    assert len(rho) == 2
    if strategy == "ffa-lora":
        assert max(rho) < 1e-6
    if strategy == "svd":
        assert rho == pytest.approx(floor, abs=1e-6)
    if strategy in ("fedit", "flora-na"):
        assert all(r > f > 0 for r, f in zip(rho, floor, strict=True))
    if strategy == "local":
        fedit = [values["rho/model"] for values in measured(finished())[1:]]
        assert all(own > shared for own, shared in zip(rho, fedit, strict=True))


def test_only_the_operator_varies_between_strategies(finished):
    """The same start and the same first training, whatever the strategy that trains both factors."""
    for name in ("partition.json", "rounds/000/state.safetensors", "rounds/001/client-002.safetensors"):
        assert (
            len({(finished({"strategy": s}) / name).read_bytes() for s in ("fedit", "flora-na", "svd", "local")}) == 1
        )


def test_ffa_lora_sends_less_and_local_nothing(finished):
    fedit, ffa, local = (measured(finished({"strategy": s}))[-1] for s in ("fedit", "ffa-lora", "local"))
    for way in ("up", "down"):
        assert 0.4 < ffa[f"bytes/{way}_adapter"] / fedit[f"bytes/{way}_adapter"] < 0.6  # q and v are square
        assert ffa[f"bytes/{way}_head"] == fedit[f"bytes/{way}_head"] > 0
    assert local["bytes/total"] == 0


def test_ffa_lora_never_moves_a(finished):
    run = RunFolder(finished({"strategy": "ffa-lora"}))
    start, end = run.read_state(0).adapter, run.read_state(2).adapter
    for module, pair in start.factors.items():
        assert torch.equal(pair.A, end.factors[module].A)
        assert not torch.equal(pair.B, end.factors[module].B)


# -- what is left to be evaluated


def test_evaluation_every_other_round_and_always_the_last(finished):
    values = measured(finished({"rounds": 3, "evaluation.every": 2}))
    assert [v.keys() >= GLOBAL for v in values] == [True, False, True, True]
    assert ["gap/accuracy" in v for v in values] == [True, False, True, True]
    assert all(v.keys() >= LOCAL for v in values)


def test_without_local_evaluation_nothing_local_is_measured(finished):
    for values in measured(finished({"evaluation.local": False})):
        assert values.keys() >= GLOBAL
        assert not any(key.startswith(("local/", "gap/")) for key in values)


def test_a_personal_strategy_scores_each_test_example_once(finished):
    run = RunFolder(finished({"strategy": "local"}))
    parts = rounds.evaluation_parts(run, 2)
    assert [part["client"] for part in parts] == [0, 1, 2]
    rows = np.concatenate([np.arange(120)[part["start"] :: part["step"]] for part in parts])
    assert sorted(rows) == list(range(120))


@pytest.fixture(scope="module")
def by_hand(finished):
    """A function: the pieces of a finished run that a client's turn is made of, with a model of its own."""

    def pieces(strategy):
        run = RunFolder(finished({"strategy": strategy}))
        setup = run.need_json("setup.json")
        data, parts = tokens.open_tokens(Path(setup["tokens"])), Partition.load(run.path / "partition.npz")
        config = run.config
        network = model.ResidentModel.build(config.model, config.lora, data.labels, 0, 99, torch.device("cpu"))
        return run, data, parts, network

    return pieces


@pytest.mark.parametrize("strategy", ["fedit", "ffa-lora", "local"])
def test_a_client_goes_on_from_what_it_was_given(by_hand, strategy):
    """From the global adapter; under `local` from its own, not from anybody else's."""
    run, data, parts, network = by_hand(strategy)
    given = run.read_tensors(run.client_stem(1, 1)) if strategy == "local" else run.read_state(1).adapter.tensors()
    trains = registry.make(strategy).plan(2).trains
    examples = tokens.examples(data.train, parts.train[1])
    turn = client.Turn(run.config.seed, 2, 1)
    trained = client.train(network, Adapter.from_tensors(given), examples, run.config.training, turn, trains, 0)
    uploaded = run.read_tensors(run.client_stem(2, 1))
    assert all(torch.equal(tensor, uploaded[name]) for name, tensor in trained.adapter.tensors().items())


def test_a_personal_strategy_is_scored_by_each_clients_own_model(by_hand):
    run, data, _, network = by_hand("local")
    total = None
    for own in range(3):
        network.load(Adapter.from_tensors(run.read_tensors(run.client_stem(2, own))))
        scores = evaluate(network, tokens.examples(data.test, np.arange(120)[own::3]), len(data.labels), 64, 0)
        total = scores if total is None else total + scores
    expected = measured(run.path)[-1]
    assert (total.accuracy, total.loss) == (expected["global/accuracy"], expected["global/loss"])


# -- selection


def test_a_fraction_of_the_clients_is_drawn_by_seed_and_round(configure, finished, tmp_path):
    changes = {"clients": 6, "fraction": 0.5, "rounds": 4, "training.local_steps": 1}
    drawn = [record.clients for record in rounds.records(RunFolder(finished(changes)))[1:]]
    assert all(len(set(clients)) == 3 and list(clients) == sorted(clients) for clients in drawn)
    assert len(set(drawn)) > 1
    again = RunFolder.create(tmp_path / "again", configure(changes))
    other = RunFolder.create(tmp_path / "other", configure({**changes, "seed": 1}))
    assert [tuple(rounds.select(again, number)) for number in (4, 3, 2, 1)] == drawn[::-1]
    assert [tuple(rounds.select(other, number)) for number in (1, 2, 3, 4)] != drawn


def test_at_least_one_client_takes_part(configure, tmp_path):
    run = RunFolder.create(tmp_path / "run", configure({"fraction": 0.01}))
    assert len(rounds.select(run, 1)) == 1


# -- what comes out


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


# -- other data, other models


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


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def decoder(request, tmp_path_factory):
    """A random decoder with the packaged tokenizer, which has a padding token that the model does not know of."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = model.load_tokenizer(ModelConfig())
    size = {"vocab_size": len(tokenizer), "bos_token_id": 101, "eos_token_id": 102}
    config = (
        GPT2Config(**size, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        if request.param == "gpt2"
        else LlamaConfig(
            **size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_decoder_end_to_end(configure, tmp_path, decoder, dtype):
    changes = {"model.name": str(decoder), "model.dtype": dtype, "rounds": 1, "lora.rank": 2}
    train(configure(changes), tmp_path / "run")
    assert measured(tmp_path / "run")[-1]["rho/model"] > 0
    network, tokenizer, _ = fedlora.load_adapter(tmp_path / "run/adapter")
    scores = scored(network, tokenizer, tmp_path / "run")
    expected = measured(tmp_path / "run")[-1]
    if dtype == "fp32":
        assert (scores.accuracy, scores.loss) == (expected["global/accuracy"], expected["global/loss"])
    assert scores.loss == pytest.approx(expected["global/loss"], abs=0.02)


def test_a_text_too_long_for_the_model_is_refused_at_once(configure, tmp_path, decoder):
    with pytest.raises(ModelError, match="at most 32 tokens"):
        train(configure({"model.name": str(decoder), "data.max_length": 33}), tmp_path / "run")


def test_every_strategy_that_comes_with_fedlora_is_tried_here():
    assert set(STRATEGIES) == set(registry._BUILTIN)
