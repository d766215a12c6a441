"""A number for a text: its scores against scipy's and scikit-learn's, what may be learned, and a whole run."""

import json
import math
import re

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy import stats
from sklearn.metrics import mean_squared_error
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import fedlora
from fedlora.config import DataConfig, ModelConfig, configfile
from fedlora.data import numbers, sources, tokens
from fedlora.data.batches import evaluation_batches, pad
from fedlora.data.partition import Partition
from fedlora.errors import ConfigError, DataError
from fedlora.objective.regression import OBJECTIVE, Pairs
from fedlora.run import preflight, rounds
from fedlora.run.loop import train
from fedlora.run.records import Setup
from fedlora.run.runfolder import RunFolder


@pytest.fixture(scope="session")
def lengths(shared):
    """A csv file of 240 glosses, with the number of their words as `length`, in tens, and a column `kind`."""

    def make(path):
        table = sources.load(DataConfig(train_size=2000), 0)
        rows = [row for row in table.tables["train"].to_pylist() if '"' not in row["text"]]
        chosen = [row for row in rows if table.labels[row["label"]] in ("animal", "plant", "person")][:240]
        lines = [f'"{row["text"]}",{len(row["text"].split()) / 10},{table.labels[row["label"]]}\n' for row in chosen]
        path.write_text("gloss,length,kind\n" + "".join(lines))

    return lambda: shared("lengths.csv", make)


@pytest.fixture(scope="session")
def measuring(tiny, lengths):
    """Dotted overrides for a tiny run that learns how long a gloss is."""
    return {
        **tiny,
        **{"task": "regression", "data.name": str(lengths()), "data.text": "gloss", "data.label": "length"},
        **{"data.train_size": None, "data.test_size": None, "partition.by": "kind"},
        **{"data.max_length": 32, "training.local_steps": 15, "training.learning_rate": 0.01},
    }


@pytest.fixture(scope="session")
def run(measuring, shared):
    config = configfile.build({**measuring, "strategy": "flora-na"})
    return RunFolder(shared("measuring-flora-na", lambda path: train(config, path)))


@pytest.fixture(scope="session")
def data(run):
    return tokens.open_tokens(Setup.read(run).tokens)


def pairs(count=50, seed=0):
    random = np.random.default_rng(seed)
    true = random.normal(size=count).round(1).astype(np.float32)  # with ties
    return Pairs((true + random.normal(size=count)).astype(np.float32), true)


def part(whole, rows):
    return Pairs(whole.predicted[rows], whole.true[rows])


def test_scores_are_those_of_scipy_and_scikit_learn():
    found = pairs()
    predicted, true = found.predicted.astype(float), found.true.astype(float)
    assert found.values() == pytest.approx(
        {
            "pearson": stats.pearsonr(predicted, true).statistic,
            "spearman": stats.spearmanr(predicted, true).statistic,
            "loss": mean_squared_error(true, predicted),
            "rmse": math.sqrt(mean_squared_error(true, predicted)),
        }
    )
    assert found.values()["pearson"] != pytest.approx(found.values()["spearman"], abs=1e-4)


def test_parts_add_up_to_the_whole_to_the_last_bit_in_any_order():
    whole = pairs()
    for cut in (1, 7, 49):
        one, two = part(whole, slice(cut)), part(whole, slice(cut, None))
        assert (one + two).values() == (two + one).values() == whole.values()
        assert (one + two).examples == 50


def test_they_are_read_again_as_they_were_and_small():
    whole = pairs(1000)
    text = json.dumps(whole.to_json())
    assert len(text) < 1000 * 11
    again = Pairs.from_json(json.loads(text))
    assert np.array_equal(again.predicted, whole.predicted)
    assert np.array_equal(again.true, whole.true)
    assert (again + whole).examples == 2000


@pytest.mark.parametrize(
    "change",
    [{"true": ""}, {"true": "AAAA"}, {"predicted": "no base 64!"}, {"true": "AADAfwAAgD8="}, {"predicted": "AACAPw=="}],
    ids=["none", "three bytes", "other signs", "NaN", "one of two"],
)
def test_what_are_no_scores(change):
    good = pairs(2).to_json()
    assert Pairs.from_json(good).examples == 2
    with pytest.raises(ValueError):  # noqa: PT011 (numpy's, or ours)
        Pairs.from_json({**good, **change})


def test_there_is_no_correlation_of_nothing_and_a_constant_answer_has_none():
    def found(predicted, true):
        return Pairs(np.array(predicted, np.float32), np.array(true, np.float32)).values()

    assert found([1, 2], [1, 3]).keys() == {"loss", "rmse"}
    assert found([1, 2, 3], [2, 2, 2]).keys() == {"loss", "rmse"}
    constant = found([2, 2, 2], [1, 2, 3])
    assert (constant["pearson"], constant["spearman"]) == (0, 0)
    assert constant["loss"] == pytest.approx(2 / 3)


def test_a_run_learns_and_says_so_by_its_correlation(run):
    values = [record.metrics for record in rounds.records(run)]
    assert values[-1]["global/pearson"] > max(0.5, values[0]["global/pearson"])
    assert values[-1]["global/loss"] < values[0]["global/loss"]
    assert values[-1]["gap/pearson"] == pytest.approx(values[-1]["local/pearson"] - values[-1]["global/pearson"])
    assert values[-1]["local/pearson_worst"] <= values[-1]["local/pearson_p10"] <= values[-1]["local/pearson"]
    assert all(0 <= each["rho/floor"] <= each["rho/model"] for each in values[1:])
    clients = json.loads((run.path / "tables" / "clients.json").read_text())
    assert all(row["pearson"] is not None for row in clients)


def test_what_is_scored_is_the_whole_test_set(run, data):
    """By the adapter on the base, as anybody has it, without ours."""
    network, *_ = fedlora.load_adapter(run.path / "adapter")
    found = predictions(network, data)
    last = rounds.records(run)[-1].metrics
    assert found.examples == len(data.test)
    assert found.values() == pytest.approx({name: last[f"global/{name}"] for name in found.values()}, rel=1e-4)


def predictions(network, data):
    examples = tokens.examples(data.test, range(len(data.test)))
    with torch.no_grad():
        every = [
            (network(**batch.model_inputs()).logits[:, 0], batch.labels)
            for batch in evaluation_batches(examples, 16, data.padding)
        ]
    return Pairs(*(torch.cat(each).numpy() for each in zip(*every, strict=True)))


def test_the_adapter_is_plain_pefts(run, data):
    base = fedlora.load_base("bert-tiny", labels=["LABEL_0"])
    network = PeftModel.from_pretrained(base, run.path / "adapter").eval()
    last = rounds.records(run)[-1].metrics
    assert predictions(network, data).values()["pearson"] == pytest.approx(last["global/pearson"], abs=1e-4)


def test_a_head_of_the_architecture_s_own_is_plain_pefts_without_ours(measuring, tmp_path, tiny_bert_with_words):
    config = {**measuring, "model.name": str(tiny_bert_with_words), "rounds": 1, "data.max_length": 32}
    train(configfile.build(config), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert_with_words, num_labels=1)
    network = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    made = tokens.open_tokens(Setup.read(folder).tokens)
    last = rounds.records(folder)[-1].metrics
    assert predictions(network, made).loss == pytest.approx(last["global/loss"], rel=1e-4)
    described = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert described["task_type"] == "SEQ_CLS"


@pytest.fixture(scope="session")
def tiny_bert_with_words(shared):
    """A model folder with a classifier's head of its architecture, and BERT-Tiny's tokenizer."""

    def make(path):
        from fedlora.model import base

        tokenizer = base.load_tokenizer(ModelConfig(name="bert-tiny"))
        small = BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
        )
        torch.manual_seed(0)
        AutoModel.from_config(small).save_pretrained(path)
        tokenizer.save_pretrained(path)

    return shared("bert-with-words", make)


def test_a_checkpoint_with_one_output_keeps_its_head(tmp_path):
    small = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=1
    )
    torch.manual_seed(1)
    stored = BertForSequenceClassification(small)
    stored.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), pooling="head")
    for labels in ([], ["animal", "plant"]):  # whatever the groups are
        loaded = OBJECTIVE.load(config, labels, 0, 0)
        assert torch.equal(loaded.classifier.weight, stored.classifier.weight)
        assert loaded.classifier.weight.shape == (1, 16)


def test_it_merges(run, data, tmp_path):
    fedlora.merge(run.path / "adapter", tmp_path / "merged")
    network, *_ = fedlora.load_merged(tmp_path / "merged")
    last = rounds.records(run)[-1].metrics
    assert predictions(network.eval(), data).values()["pearson"] == pytest.approx(last["global/pearson"], abs=1e-4)


def test_the_numbers_come_to_the_batches_as_they_are(data, lengths):
    examples = tokens.examples(data.train, range(len(data.train)))
    batch = pad(examples, np.arange(4), data.padding)
    assert batch.labels.dtype == torch.float32
    written = {float(line.rsplit(",", 2)[1]) for line in lengths().read_text().splitlines()[1:]}
    assert {round(float(value), 4) for value in examples.values} <= {round(value, 4) for value in written}
    assert len(set(examples.values)) > 5


def test_clients_are_dealt_by_the_column_that_is_named(run):
    dealt = Partition.load(run.path / "partition.npz")
    assert dealt.labels == ("animal", "person", "plant")
    assert dealt.label_counts.sum() == sum(dealt.sizes)


@pytest.mark.parametrize("name", ["iid", "quantity"])
def test_without_a_column_clients_are_dealt_at_random(measuring, name):
    found = preflight.check(configfile.build({**measuring, "partition.by": None, "partition.name": name}))
    assert found.dealt is not None
    assert found.dealt.labels == 1


def test_owners_are_clients(measuring):
    changes = {"partition.by": None, "partition.name": "natural-id", "data.client": "kind", "clients": 3}
    found = preflight.check(configfile.build({**measuring, **changes}))
    assert found.dealt is not None
    assert found.dealt.smallest > 10


def test_a_partition_by_label_needs_a_column(measuring):
    with pytest.raises(ConfigError, match=r"deals examples by label, and task=regression has none; set partition.by"):
        preflight.check(configfile.build({**measuring, "partition.by": None}))


def test_what_is_of_another_task_is_refused(measuring):
    with pytest.raises(ConfigError, match=r"data\.messages=chat is for dialogues; leave it out, or set"):
        preflight.check(configfile.build({**measuring, "data.messages": "chat"}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a,1", "b,good", "c,2"], "1 of 3 examples have no number there, which is what task=regression learns (first: "
         "row 2, 'good')"),
        (["a,1", "b,", "c,nan"], "2 of 3 examples have no number there"),
        (["a,1", "b,1e999", "c,2"], "(first: row 2, '1e999')"),
        (["a,3", "b,3.0", "c,3", "d,3", "e,3"], "have the number 3 in column 'score', so there is nothing to learn"),
    ],
    ids=["words", "gaps", "too large", "all the same"],
)  # fmt: skip
def test_what_is_no_number_is_named(tmp_path, rows, message):
    file = tmp_path / "mine.csv"
    file.write_text("text,score\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError, match=re.escape(message)):
        numbers.read(DataConfig(name=str(file), label="score"), None, 0)


def test_a_missing_column_says_which_there_are(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("text,score\na,1\nb,2\n")
    with pytest.raises(DataError, match=r"has no column 'scores' for the label; .* Did you mean 'score'\?"):
        numbers.read(DataConfig(name=str(file), label="scores"), None, 0)


def test_pairs_of_texts_have_a_number_too(tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [{"one": f"a {n}", "two": f"b {n}", "score": n / 2} for n in range(20)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = DataConfig(name=str(file), text="one", text_pair="two", label="score")
    found = sources.finish(numbers.read(config, None, 0))
    assert (len(found.tables["train"]), len(found.tables["test"]), found.labels) == (16, 4, ("all",))
    first = found.tables["train"].to_pylist()[0]
    assert first["value"] == float(first["text"].removeprefix("a ")) / 2
    assert first["text_pair"] == first["text"].replace("a", "b")
    file.write_text("".join(f"{json.dumps({**row, 'score': row['score'] + 1})}\n" for row in rows))
    assert sources.finish(numbers.read(config, None, 0)).digest != found.digest


def test_too_few_test_examples_are_refused_before_training(measuring, tmp_path):
    with pytest.raises(DataError, match=r"2 test examples with .* tell no correlation; expected at least 3"):
        train(configfile.build({**measuring, "data.test_size": 2}), tmp_path / "run")
