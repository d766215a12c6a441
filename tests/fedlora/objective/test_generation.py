"""A decoder that is tuned on instructions: its loss and scores against Transformers' own, and a whole run."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedlora
from fedlora.adapter import Adapter
from fedlora.config import ModelConfig, configfile
from fedlora.config.lora import LoraConfig
from fedlora.data import tokens
from fedlora.data.batches import evaluation_batches, pad
from fedlora.data.partition import Partition
from fedlora.errors import ConfigError, ModelError
from fedlora.model.resident import ResidentModel
from fedlora.objective.generation import OBJECTIVE, TokenScores
from fedlora.run import preflight, rounds
from fedlora.run.loop import train
from fedlora.run.records import Setup
from fedlora.run.runfolder import RunFolder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(writing, shared):
    """A finished run of FLoRA-NA, two rounds."""
    config = configfile.build({**writing, "strategy": "flora-na"})
    return RunFolder(shared("writing-flora-na", lambda path: train(config, path)))


@pytest.fixture(scope="module")
def data(run):
    return tokens.open_tokens(Setup.read(run).tokens)


@pytest.fixture(scope="module")
def model(small_llama):
    return ResidentModel.build(OBJECTIVE, ModelConfig(name=str(small_llama())), LoraConfig(rank=4), [], 0, 0, CPU)


def theirs(network, batch):
    """Mean loss and number of tokens by Transformers, which shifts the labels itself."""
    with torch.no_grad():
        found = network(**batch.model_inputs(), labels=batch.labels)
    return float(found.loss), int((batch.labels[:, 1:] != -100).sum())


def test_the_loss_of_a_batch_is_transformers_own(model, data):
    examples = tokens.examples(data.train, range(12))
    batch = pad(examples, np.arange(12), data.padding)
    model.peft.eval()
    mean, units = OBJECTIVE.loss(model, batch)
    loss, count = theirs(model.peft, batch)
    assert float(mean.detach()) == pytest.approx(loss, rel=1e-5)
    assert units == count > 12


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_scores_count_tokens_whatever_the_batches(model, data, batch_size):
    examples = tokens.examples(data.test, range(len(data.test)))
    scores = OBJECTIVE.evaluate(model, examples, batch_size, data.padding)
    found = [theirs(model.peft, batch) for batch in evaluation_batches(examples, 1, data.padding)]
    total = sum(count for _, count in found)
    assert scores.tokens == total
    assert scores.loss == pytest.approx(sum(loss * count for loss, count in found) / total, rel=1e-5)
    assert scores.values()["perplexity"] == pytest.approx(np.exp(scores.loss))


def test_parts_add_up_and_are_read_again(model, data):
    whole = OBJECTIVE.evaluate(model, tokens.examples(data.test, range(20)), 8, data.padding)
    one, two = (
        OBJECTIVE.evaluate(model, tokens.examples(data.test, r), 8, data.padding) for r in (range(7), range(7, 20))
    )
    both = one + two
    assert (both.tokens, both.hits, both.count) == (whole.tokens, whole.hits, whole.count)
    assert both.loss == pytest.approx(whole.loss, rel=1e-6)
    assert TokenScores.from_json(json.loads(json.dumps(both.to_json()))) == both


@pytest.mark.parametrize("change", [{"tokens": -1}, {"hits": 10**6}, {"loss_sum": "1"}, {"count": 1.5}])
def test_what_are_no_scores(change):
    good = {"loss_sum": 1.0, "tokens": 10, "hits": 5, "count": 2}
    assert TokenScores.from_json(good).examples == 2
    with pytest.raises(ValueError, match="scores are"):
        TokenScores.from_json({**good, **change})


def test_a_run_learns_and_says_so_by_its_loss(run):
    values = [record.metrics for record in rounds.records(run)]
    assert values[-1]["global/loss"] < values[0]["global/loss"] - 0.1
    assert all(0 <= each["global/token_accuracy"] <= 1 for each in values)
    assert values[-1]["gap/loss"] == pytest.approx(values[-1]["local/loss"] - values[-1]["global/loss"])
    assert values[-1]["local/loss_worst"] >= values[-1]["local/loss_p10"] >= values[-1]["local/loss"]
    assert all(0 <= each["rho/floor"] <= each["rho/model"] < 1 for each in values[1:])
    assert not any(name.split("/")[-1] == "accuracy" for name in values[-1])


def test_the_adapter_is_plain_pefts(run, data, small_llama):
    base = AutoModelForCausalLM.from_pretrained(small_llama())
    network = PeftModel.from_pretrained(base, run.path / "adapter").eval()
    examples = tokens.examples(data.test, range(len(data.test)))
    found = [theirs(network, batch) for batch in evaluation_batches(examples, 8, data.padding)]
    loss = sum(loss * count for loss, count in found) / sum(count for _, count in found)
    assert loss == pytest.approx(rounds.records(run)[-1].metrics["global/loss"], rel=1e-5)
    assert json.loads((run.path / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_an_interrupted_run_ends_like_an_uninterrupted_one(run, writing, tmp_path):
    config = configfile.build({**writing, "strategy": "flora-na"})

    class Stopped(Exception):
        pass

    def stop(record):
        if record.round == 1:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, tmp_path / "run", report=stop)
    train(config, tmp_path / "run")
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (run.path / name).read_bytes()


def test_a_model_that_does_not_write_is_refused_before_anything_starts(writing):
    with pytest.raises(ModelError, match="which does not write; task=generation needs a causal"):
        preflight.check(configfile.build({**writing, "model.name": "bert-tiny"}))


def test_a_partition_by_label_needs_a_column(writing):
    found = preflight.check(configfile.build(writing))
    assert found.dealt is not None
    assert found.dealt.labels == 3
    with pytest.raises(ConfigError, match=r"partition.name=dirichlet deals examples by label, and task=generation has"):
        preflight.check(configfile.build({**writing, "partition.by": None}))
    found = preflight.check(configfile.build({**writing, "partition.by": None, "partition.name": "quantity"}))
    assert found.dealt is not None


COLUMNS = {
    "a prompt without a response": ({"prompt": "instruction"}, "data.prompt is given without data.response; expected"),
    "a response without a prompt": (
        {"response": "output"},
        "data.response is given without data.prompt",
    ),
    "two ways to ask": (
        {"prompt": "a", "response": "b", "template": "{{ a }}"},
        "data.prompt and data.template both",
    ),
    "chats and responses": ({"messages": "a", "response": "b"}, "data.messages holds the responses too; leave"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_that_do_not_go_together_are_refused(writing, case):
    changes, words = COLUMNS[case]
    with pytest.raises(ConfigError, match=words):
        preflight.check(configfile.build({**writing, **{f"data.{key}": value for key, value in changes.items()}}))


def test_a_run_that_is_packed_and_accumulated_learns_what_another_does(writing, shared, run):
    """The same examples in each step, to rounding."""
    changes = {"training.packing": True, "training.batch_size": 2, "training.gradient_accumulation": 4}
    config = configfile.build({**writing, "strategy": "flora-na", **changes})
    found = RunFolder(shared("writing-packed", lambda path: train(config, path)))
    losses = [[rounds.read_record(each, number).metrics["global/loss"] for number in range(3)] for each in (found, run)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0][2] < losses[0][0]


def test_clients_weigh_as_many_tokens_as_they_train(writing, shared):
    """Told of the partition, in the clients' table and in what the server makes of a round."""
    changes = {"weighting": "tokens", "strategy": "fedit", "rounds": 1}
    run = RunFolder(shared("writing-tokens", lambda path: train(configfile.build({**writing, **changes}), path)))
    split = tokens.open_tokens(Setup.read(run).tokens).train
    parts = Partition.load(run.path / "partition.npz").train
    counted = [
        sum(int((np.array(row[1:]) != -100).sum()) for row in split["targets"].take(p).to_pylist()) for p in parts
    ]
    assert run.read_json("partition.json")["tokens"] == counted
    assert [row["tokens"] for row in json.loads((run.path / "tables" / "clients.json").read_text())] == counted
    assert np.std(np.divide(counted, [len(p) for p in parts])) > 0  # not the same weights as by examples
    sent = [Adapter.from_tensors(run.read_tensors(run.client_stem(1, client))) for client in range(3)]
    mean = {
        name: sum(w / sum(counted) * each.tensors()[name] for w, each in zip(counted, sent, strict=True))
        for name in sent[0].tensors()
    }
    made = Adapter.from_tensors(load_file(run.path / "adapter" / "adapter_model.safetensors"))
    for name, tensor in made.tensors().items():
        torch.testing.assert_close(tensor, mean[name], rtol=1e-5, atol=1e-7)


def test_tokens_are_no_weight_of_labels(tiny):
    with pytest.raises(
        ConfigError, match=r"weighting=tokens is for task=generation; set weighting to examples or unif"
    ):
        preflight.check(configfile.build({**tiny, "weighting": "tokens"}))


def test_packing_is_for_dialogues(tiny):
    with pytest.raises(ConfigError, match=r"training.packing=true is for task=generation; leave it out"):
        preflight.check(configfile.build({**tiny, "training.packing": True}))


@pytest.mark.parametrize("changes", [{"partition.by": "label"}, {"data.prompt": "a", "data.response": "b"}])
def test_what_is_of_another_task_is_refused(tiny, changes):
    with pytest.raises(ConfigError, match="is for tasks without labels; leave it out, or set task=generation"):
        preflight.check(configfile.build({**tiny, **changes}))


def test_the_adapter_loads_and_merges_by_ours_too(run, data, tmp_path):
    network, tokenizer, labels = fedlora.load_adapter(run.path / "adapter")
    assert labels == []
    assert tokenizer.eos_token == "</s>"
    batch = pad(tokens.examples(data.test, range(6)), np.arange(6), data.padding)
    loss, _ = theirs(network, batch)
    fedlora.merge(run.path / "adapter", tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert theirs(plain, batch)[0] == pytest.approx(loss, rel=1e-5)
    again, _, _ = fedlora.load_merged(tmp_path / "merged")
    assert theirs(again, batch)[0] == pytest.approx(loss, rel=1e-5)


def test_the_tokenizer_and_the_end_of_an_answer(run, data, small_llama):
    """What is trained of every example ends with the end token."""
    end = AutoTokenizer.from_pretrained(small_llama()).eos_token_id
    examples = tokens.examples(data.train, range(len(data.train)))
    assert examples.targets is not None
    assert {int(row[-1]) for row in examples.targets} == {end}
