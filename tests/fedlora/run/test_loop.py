"""Whole federated runs, tiny but real: what they measure, and what comes out of them."""

import contextlib
import importlib
import json
import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModel, GPT2Config, LlamaConfig

import fedlora
from fedlora import metrics
from fedlora.adapter import Adapter, Factors
from fedlora.config import ModelConfig
from fedlora.data import tokens
from fedlora.data.partition import Partition
from fedlora.errors import ModelError
from fedlora.model import base as model
from fedlora.model.resident import ResidentModel
from fedlora.model.targets import stores_transposed
from fedlora.objective.classification import OBJECTIVE
from fedlora.run import groups, inspection, participation, probe, rounds, server, traffic
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder
from fedlora.seeds import Turn
from fedlora.strategies import registry, step
from fedlora.training import client
from fedlora.training.workers import open_pool

STRATEGIES = tuple(registry._BUILTIN)
BOTH = ("fedit", "flora-na", "svd", "local", "flora", "fedex-lora", "oracle", "fedsa-lora", "replication", "lora-fair")
"""Those whose clients train both factors, on the data and nothing else."""
ALWAYS = {"bytes/up_adapter", "bytes/up_head", "bytes/down_adapter", "bytes/down_head", "bytes/down_base"} | {
    *("bytes/total", "time/train_s", "time/read_s", "time/aggregate_s", "time/divergence_s"),
    *("time/evaluate_s", "time/round_s"),
}
TRAINED = {"rho/model", "rho/floor", "rho/excess", "rho/effective_clients", "abo/R", "abo/P", "abo/Q"} | {
    *("abo/dispersion", "clients/selected", "clients/completed", "memory/client_bytes", "memory/server_bytes")
}
KEPT = ("fedsa-lora", "lora_B.weight")
GLOBAL = {"global/accuracy", "global/loss", "global/macro_f1"}
LOCAL = {"local/accuracy", "local/accuracy_p10", "local/accuracy_worst"}


def measured(folder) -> list[dict]:
    return [dict(record.metrics) for record in rounds.records(RunFolder(folder))]


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
        phases = ("train", "read", "aggregate", "divergence", "evaluate")
        assert all(values[f"time/{phase}_s"] > 0 for phase in phases)
        assert values["time/round_s"] >= sum(values[f"time/{phase}_s"] for phase in phases)


def test_an_update_is_read_once_and_the_state_is_not_read_by_who_made_it(configure, monkeypatch, tmp_path):
    """By the server; a worker reads the state that it trains on. After a restart, both are read again."""
    parsed, opened, states = [], [], []
    real_json, real_state = RunFolder.read_json, RunFolder.read_state

    def read_json(run, name):
        content = real_json(run, name)
        if content is not None and "client-" in name:
            parsed.append(name)
        return content

    class Stored(inspection.uploads.StoredTensors):
        def each(self):
            opened.append(self.path.name)
            return super().each()

        def read(self, names):
            raise AssertionError("read a second time")

    monkeypatch.setattr(RunFolder, "read_json", read_json)
    monkeypatch.setattr(inspection.uploads, "StoredTensors", Stored)
    monkeypatch.setattr(
        RunFolder, "read_state", lambda run, number: (states.append(number), real_state(run, number))[1]
    )
    train(configure(), tmp_path / "run")
    assert sorted(parsed) == sorted({*parsed})
    assert sorted(opened) == sorted(f"client-{client:03d}.safetensors" for client in range(3) for _ in range(2))
    assert sorted(states) == [0, 0, 1, 2, 2]  # by the worker each, by the server at the start, for the final adapter


def test_uploads_beyond_the_memory_of_a_round_live_in_their_files(configure, finished, monkeypatch, tmp_path):
    monkeypatch.setattr(server, "_IN_MEMORY", 1)
    train(configure({"strategy": "svd"}), tmp_path / "run")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (finished({"strategy": "svd"}) / name).read_bytes()


def test_what_a_client_keeps_for_itself_outlives_the_file_it_came_in(configure, finished, monkeypatch, tmp_path):
    """Clients are away for rounds, and no upload is kept longer than one."""
    changes = {"strategy": "local", "rounds": 5, "fraction": 0.34, "keep_rounds": 1}
    monkeypatch.setattr(server, "_IN_MEMORY", 0)
    train(configure(changes), tmp_path / "run")
    assert not (tmp_path / "run/rounds/002/state.json").exists()
    last = "rounds/005/state.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (finished({**changes, "keep_rounds": None}) / last).read_bytes()


def test_seconds_of_aggregation_are_those_of_the_strategy_alone(configure, monkeypatch, tmp_path):
    """Reading takes 100 virtual seconds an update, aggregation 7, measuring 1000; the probe aggregates twice more."""
    now = [0.0]

    def costs(seconds, function):
        def slow(*args, **more):
            now[0] += seconds
            return function(*args, **more)

        return slow

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(inspection, "inspect", costs(100.0, inspection.inspect))
    monkeypatch.setattr(step, "advance", costs(7.0, step.advance))
    monkeypatch.setattr(step, "measure_round", costs(1000.0, step.measure_round))
    monkeypatch.setattr(probe, "advance", costs(50.0, probe.advance))
    train(configure({"strategy": "replication", "lora.ranks": [2, 4, 7], "rounds": 1}), tmp_path / "run")
    values = measured(tmp_path / "run")[1]
    seconds = tuple(values[f"time/{phase}_s"] for phase in ("read", "aggregate", "divergence"))
    assert seconds == (300.0, 7.0, 1000.0)
    assert values["time/round_s"] >= 1407.0


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


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "centralised"])
def test_every_strategy_runs_with_a_sensible_divergence(finished, strategy):
    values = measured(finished({"strategy": strategy}))[1:]
    rho, floor = ([v[name] for v in values] for name in ("rho/model", "rho/floor"))
    assert len(rho) == 2
    if registry.find(strategy).traits.exact:
        assert max(rho) < 1e-5
    elif strategy in ("svd", "flexlora"):
        assert rho == pytest.approx(floor, abs=1e-6)
    elif not registry.find(strategy).traits.changes_base:  # what is added to the base is not bound by the rank
        assert all(r > f - 1e-6 > 0 for r, f in zip(rho, floor, strict=True))
    if strategy in ("fedit", "flora-na", "lora-fair"):
        assert all(r > 1.01 * f for r, f in zip(rho, floor, strict=True))
    if strategy == "local":
        fedit = [v["rho/model"] for v in measured(finished())[1:]]
        assert all(own > shared for own, shared in zip(rho, fedit, strict=True))


def test_where_one_client_has_all_data_there_is_no_divergence_to_speak_of(finished):
    values = measured(finished({"strategy": "centralised"}))[1:]
    assert not any(name in v for v in values for name in ("rho/model", "rho/floor", "rho/excess"))
    assert all("abo/R" in v for v in values)


def test_only_the_operator_varies_between_strategies(finished):
    """The same start and the same first training, whatever the strategy that trains both factors."""
    for name in ("partition.json", "rounds/000/state.safetensors", "rounds/001/client-002.safetensors"):
        assert len({(finished({"strategy": strategy}) / name).read_bytes() for strategy in BOTH}) == 1


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
    assert [part.client for part in parts] == [0, 1, 2]
    rows = np.concatenate([np.arange(60)[part.start :: part.step] for part in parts])
    assert sorted(rows) == list(range(60))


@pytest.fixture(scope="module")
def by_hand(finished):
    """A function: the pieces of a finished run that a client's turn is made of, with a model of its own."""

    def pieces(strategy):
        run = RunFolder(finished({"strategy": strategy}))
        setup = run.need_json("setup.json")
        data, parts = tokens.open_tokens(Path(setup["tokens"])), Partition.load(run.path / "partition.npz")
        config = run.config
        network = ResidentModel.build(OBJECTIVE, config.model, config.lora, data.labels, 0, 99, torch.device("cpu"))
        return run, data, parts, network

    return pieces


@pytest.mark.parametrize(
    "strategy",
    ["fedit", "ffa-lora", "local", "fedsa-lora", "rolora", "flora", "oracle", "centralised", "fed-sb", "ravan"],
)
def test_a_client_goes_on_from_what_it_was_given(by_hand, strategy):
    """From the global adapter, on the base as it then is; under `local` from its own and nobody else's, under
    `fedsa-lora` with its own B; under `centralised` with everybody's rows."""
    run, data, parts, network = by_hand(strategy)
    who = 0 if strategy == "centralised" else 1
    before, given = run.read_state(1), run.read_state(1).adapter.tensors()
    own = run.read_tensors(run.client_stem(1, who))
    given = {n: own[n] if strategy == "local" or (strategy, n[-13:]) == KEPT else t for n, t in given.items()}
    rows = np.unique(np.concatenate(parts.train)) if strategy == "centralised" else parts.train[who]
    network.set_base(before.base, "round 1")
    turn, trains = client.Turn(run.config.seed, 2, who), registry.make(strategy).plan(2).trains
    start, examples = Adapter.from_tensors(given), tokens.examples(data.train, rows)
    trained = client.train(network, start, examples, run.config.training, turn, trains, data.padding)
    uploaded = run.read_tensors(run.client_stem(2, who))
    assert bool(before.base) == registry.find(strategy).traits.changes_base
    assert all(torch.equal(tensor, uploaded[name]) for name, tensor in trained.adapter.tensors().items())


@pytest.mark.parametrize("strategy", ["local", "fedsa-lora"])
def test_a_personal_strategy_is_scored_by_each_clients_own_model(by_hand, strategy):
    """Its own B with the shared A and head under `fedsa-lora`."""
    run, data, _, network = by_hand(strategy)
    shared, total = run.read_state(2).adapter.tensors(), None
    for own in range(3):
        mine = run.read_tensors(run.client_stem(2, own))
        kept = {n: t if strategy == "local" or (strategy, n[-13:]) == KEPT else shared[n] for n, t in mine.items()}
        network.load(Adapter.from_tensors(kept))
        scores = OBJECTIVE.evaluate(network, tokens.examples(data.test, np.arange(60)[own::3]), 64, data.padding)
        total = scores if total is None else total + scores
    expected = measured(run.path)[-1]
    assert (total.accuracy, total.loss) == (expected["global/accuracy"], expected["global/loss"])


@pytest.mark.parametrize("epochs", [None, 0.5])
def test_centralised_is_one_client_with_all_rows_and_the_steps_of_one(finished, epochs):
    length = {} if epochs is None else {"training.local_steps": None, "training.local_epochs": epochs}
    folder = finished({"strategy": "centralised", **length})
    each = [record.clients for record in rounds.records(RunFolder(folder))]
    assert each == [(), (0,), (0,)]
    record = json.loads((folder / "rounds/001/client-000.json").read_text())
    sizes = json.loads((folder / "partition.json").read_text())["sizes"]
    assert record["examples"] == sum(sizes) == 400
    steps = 2 if epochs is None else round(sum(math.ceil(math.ceil(n / 8) * epochs) for n in sizes) / 3)
    assert len(record["losses"]) == pytest.approx(steps, abs=0 if epochs is None else 1)
    assert sum(np.array(record["local"]["confusion"]).ravel()) == 60
    assert measured(folder)[-1]["bytes/total"] == 0


# -- strategies that change the base


def dense(pair: Factors) -> torch.Tensor:
    return pair.B.double() @ pair.A.double()


def mean_update(run: RunFolder, number: int) -> dict[str, torch.Tensor]:
    """`W* = s·Σ w_u B_uA_u` by module, from the uploads of a round."""
    stems = [run.client_stem(number, u) for u in range(3)]
    examples = np.array([run.need_json(f"{stem}.json")["examples"] for stem in stems])
    adapters = [Adapter.from_tensors(run.read_tensors(stem)) for stem in stems]
    return {
        module: run.config.lora.scaling
        * sum(w * dense(a.factors[module]) for w, a in zip(examples / examples.sum(), adapters, strict=True))
        for module in adapters[0].modules
    }


CHANGES = {
    "flora": {"strategy": "flora"},
    "flora, mixed ranks": {"strategy": "flora", "lora.ranks": [2, 4, 7]},
    "fedex-lora": {"strategy": "fedex-lora"},
    "oracle": {"strategy": "oracle"},
    "oracle, a decoder": {"strategy": "oracle", "lora.rank": 2, "lora.alpha": 5, "decoder": True},
    "fedex-lora, rslora": {"strategy": "fedex-lora", "lora.variant": "rslora", "lora.alpha": 5},
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_global_model_is_w0_plus_the_mean_update_round_after_round(finished, decoders, case, logits, tokens):
    """After each round; in round two the clients' products came on top of the base that round one left."""
    changes = dict(CHANGES[case])
    if changes.pop("decoder", False):
        changes["model.name"] = str(decoders["gpt2"])
    run = RunFolder(finished(changes))
    labels, scaling = run.need_json("setup.json")["labels"], run.config.lora.scaling
    resident = ResidentModel.build(OBJECTIVE, run.config.model, run.config.lora, labels, 0, 99, torch.device("cpu"))
    below: dict[str, torch.Tensor] = {}
    for number in (1, 2):
        state, mean = run.read_state(number), mean_update(run, number)
        by_hand = model.load_base(run.config.model, labels, 0)
        by_hand.load_state_dict({**by_hand.state_dict(), **state.adapter.head})
        for module, update in mean.items():
            layer = by_hand.get_submodule(module)
            total = (update + below.get(module, 0)).float()
            layer.weight.data += total.T if stores_transposed(layer) else total
            below[module] = update + below.get(module, 0) - scaling * dense(state.adapter.factors[module])
        resident.set_base(state.base, number)
        resident.load(state.adapter)
        expected, found = logits(by_hand, tokens(5, 12)), logits(resident.peft, tokens(5, 12))
        untrained = logits(model.load_base(run.config.model, labels, 0), tokens(5, 12))
        assert (found - expected).norm() < 1e-4 * (expected - untrained).norm()
        scores = scored(by_hand, SimpleNamespace(pad_token_id=0, padding_side="right"), run.path)
        assert scores.loss == pytest.approx(measured(run.path)[number]["global/loss"], rel=1e-5)


def test_two_runs_that_share_a_worker_do_not_disturb_each_other(configure, finished, tmp_path):
    changes = [{"strategy": "flora"}, {"strategy": "fedit"}, {"strategy": "oracle"}, {"strategy": "flora", "seed": 1}]
    configs = [configure(each) for each in changes]
    with open_pool(configs[0].runner) as pool, ThreadPoolExecutor(4) as threads:
        assert len(pool.slots) == 1
        list(threads.map(train, configs, [tmp_path / str(index) for index in range(4)]))
    for index, each in enumerate(changes):
        for name in ("rounds/002/state.safetensors", "rounds/002/client-001.safetensors", "tables/divergence.json"):
            assert (tmp_path / str(index) / name).read_bytes() == (finished(each) / name).read_bytes()
        alone = [metrics.reproducible(m) for m in measured(finished(each))]
        assert [metrics.reproducible(m) for m in measured(tmp_path / str(index))] == alone


def test_the_record_of_a_round_is_read_once_for_all_clients_of_the_next(finished, monkeypatch):
    run, read, need_json = RunFolder(finished({"strategy": "flora"})), [], RunFolder.need_json
    monkeypatch.setattr(RunFolder, "need_json", lambda run, name: (read.append(name), need_json(run, name))[1])
    traffic._of.cache_clear()
    assert all(traffic.missed_base(run, Turn(0, 3, client), 10**9) > 0 for client in range(3))
    assert read == ["rounds/002/record.json"]


def test_a_client_downloads_what_it_missed_of_the_base(finished):
    changes = {"strategy": "flora", "clients": 5, "fraction": 0.4, "rounds": 5, "training.local_steps": 1}
    run = RunFolder(finished({**changes, "lora.rank": 2}))
    steps = {number: run.read_state(number).base_step.wire_bytes() for number in range(6)}
    took_part: dict[int, int] = {}
    waited = set()
    for record in rounds.records(run)[1:]:
        each = []
        for who in record.clients:
            missed = sum(steps[number] for number in range(took_part.get(who, 0), record.round))
            each.append(min(missed, run.read_state(record.round - 1).base.wire_bytes()))
            assert run.need_json(f"{run.client_stem(record.round, who)}.json")["bytes"]["down_base"] == each[-1]
            waited.add(record.round - took_part.get(who, 0))
            took_part[who] = record.round
        assert record.metrics["bytes/down_base"] == sum(each)
        assert (sum(each) > 0) == (record.round > 1)
    assert steps[0] == 0
    assert len(waited) > 2


# -- selection


def test_a_fraction_of_the_clients_is_drawn_by_seed_and_round(configure, finished, tmp_path):
    changes = {"clients": 6, "fraction": 0.5, "rounds": 4, "training.local_steps": 1}
    drawn = [record.clients for record in rounds.records(RunFolder(finished(changes)))[1:]]
    assert all(len(set(clients)) == 3 and list(clients) == sorted(clients) for clients in drawn)
    assert len(set(drawn)) > 1
    again = RunFolder.create(tmp_path / "again", configure(changes))
    other = RunFolder.create(tmp_path / "other", configure({**changes, "seed": 1}))
    assert [participation.next_ask(again, number).clients for number in (4, 3, 2, 1)] == drawn[::-1]
    assert [participation.next_ask(other, number).clients for number in (1, 2, 3, 4)] != drawn


def test_at_least_one_client_takes_part(configure, tmp_path):
    run = RunFolder.create(tmp_path / "run", configure({"fraction": 0.01}))
    assert len(participation.next_ask(run, 1).clients) == 1


# -- other models


@pytest.fixture(scope="session")
def decoders(tmp_path_factory):
    """Random decoders with the packaged tokenizer, which has a padding token that the models do not know of."""
    return {name: _decoder(name, tmp_path_factory.mktemp(name)) for name in ("gpt2", "llama")}


@pytest.fixture(params=["gpt2", "llama"])
def decoder(request, decoders):
    return decoders[request.param]


def _decoder(name, folder):
    tokenizer = model.load_tokenizer(ModelConfig())
    size = {"vocab_size": len(tokenizer), "bos_token_id": 101, "eos_token_id": 102}
    config = (
        GPT2Config(**size, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        if name == "gpt2"
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


def test_a_strategy_that_does_not_fit_the_layers_is_refused_before_anyone_trains(configure, tmp_path):
    changes = {"strategy": "fed-sb", "lora.target_modules": "word_embeddings", "lora.rank": 2}
    with pytest.raises(ModelError, match="is no linear layer, and only these can have a core between A and B"):
        train(configure(changes), tmp_path / "run")
    assert not (tmp_path / "run/rounds").exists()


def test_a_new_run_in_the_folder_of_a_deleted_one_has_nothing_of_it(configure, finished, tmp_path):
    """A worker that stays, as in a sweep, keeps partition, states and base by the run's id, not by its place."""
    other = {"strategy": "flora", "seed": 1}
    with open_pool(configure().runner):
        train(configure({"strategy": "flora"}), tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
        train(configure(other), tmp_path / "run")
    left, right = (folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "run", finished(other)))
    assert left.read_bytes() == right.read_bytes()


# -- interruption

HANG = """
import time

def hang(bench, folder, number, client, attempt, needed):
    (folder / "hangs").touch()
    time.sleep(600)
"""


@pytest.mark.timeout(100)
def test_an_interruption_does_not_wait_for_a_worker_that_hangs(configure, tmp_path, monkeypatch):
    (tmp_path / "jobs_that_hang.py").write_text(HANG)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("fedlora.run.jobs.fine_tune", importlib.import_module("jobs_that_hang").hang)
    real = groups.train

    def interrupted(slot, run, ask, *how):
        if 0 not in ask.clients:
            return real(slot, run, ask, *how)
        while not (tmp_path / "run/hangs").exists():
            time.sleep(0.02)
        raise KeyboardInterrupt

    monkeypatch.setattr(groups, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(configure({"runner.kind": "processes", "runner.slots": 2}), tmp_path / "run")
    assert (tmp_path / "run/hangs").exists()


def test_the_learning_rate_of_the_last_round_is_the_final_one(finished):
    run = RunFolder.open(finished({"training.final_learning_rate": 1e-12}))
    before, after = (run.read_state(number).adapter.tensors() for number in (1, 2))
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in before)
    start = run.read_state(0).adapter.tensors()
    assert not all(torch.allclose(before[name], start[name], atol=1e-6) for name in before)
