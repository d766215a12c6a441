"""What is refused before a run: everything that the data, the model's configuration and its tokenizer tell; each in
the words of the run itself, without a folder, weights or a network."""

import shutil

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

import fedlora
from fedlora.config import ModelConfig, configfile
from fedlora.errors import ConfigError, DataError, FedloraError, ModelError, RunFolderError
from fedlora.model import outline
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import OBJECTIVE
from fedlora.run import jobs, preflight
from fedlora.run.runfolder import RunFolder
from fedlora.training.workers import Workbench

WORDS = ["goal", "match", "team", "chip", "phone", "code", "soup", "bread", "cheese"]
ROWS = 120


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """A home of its own, whose cache nobody else fills."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("FEDLORA_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """`table(label="a")`: a csv of 120 texts in three classes by four owners, columns replaced or (None) dropped."""

    def write(**columns):
        found = pd.DataFrame({
            "text": [f"{WORDS[i % 9]} {WORDS[i % 7]}" for i in range(ROWS)],
            "label": list("abc") * (ROWS // 3),
            "owner": [f"o{i % 4}" for i in range(ROWS)],
        })  # fmt: skip
        for name, value in columns.items():
            found = found.drop(columns=name) if value is None else found.assign(**{name: value})
        path = tmp_path_factory.mktemp("data") / "mine.csv"
        found.to_csv(path, index=False)
        return path

    return write


@pytest.fixture(scope="module")
def words():
    """`words(folder, "[PAD]")`: a tokenizer of eleven tokens, and those that are added to it, in a folder."""

    def save(folder, *added, pad=None):
        vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
        tokenizer.add_tokens(list(added), special_tokens=True)
        if pad:
            tokenizer.pad_token = pad
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def bert(tmp_path_factory, words):
    """`bert(rows=11)`: a small BERT with so many rows for tokens, and its tokenizer of eleven."""

    def save(*added, rows=11, pad="<eos>"):
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=rows,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=40,
            pad_token_id=1,
        )
        folder = tmp_path_factory.mktemp("bert")
        AutoModel.from_config(config).save_pretrained(folder)
        return words(folder, *added, pad=pad)

    return save


@pytest.fixture(scope="module")
def good(bert, table):
    """The settings of a run that can begin."""
    return {
        "data.name": str(table()),
        "model.name": str(bert()),
        "data.max_length": 12,
        "clients": 2,
        "rounds": 1,
        "partition.name": "iid",
        "training.local_steps": 1,
        "runner.kind": "threads",
        "runner.device": "cpu",
    }


DATA = {
    "no text column": ({}, {"text": None}, "has no column 'text' for the text; its columns are: label, owner"),
    "a text column of another name": ({"data.text": "body"}, {}, "no column 'body' for the text"),
    "no label column": ({"data.label": "topic"}, {}, "no column 'topic' for the label"),
    "no owner column": ({"data.client": "author"}, {}, "no column 'author' for the client"),
    "no pair column": ({"data.text_pair": "reply"}, {}, "no column 'reply' for the text pair"),
    "one class": ({}, {"label": "a"}, "has one class only"),
    "every label another": ({}, {"label": range(ROWS)}, "all 120 labels differ"),
    "a row without label": ({}, {"label": ["a", "b", None, *"ab" * 58, "a"]}, "1 of 120 examples have no label"),
    "one class drawn": ({"data.train_size": 1}, {}, "data.train_size=1 leaves 1 training example"),
    "owners that nobody names": ({"partition.name": "natural-id"}, {}, "natural-id needs data.client, the column"),
    "more clients than owners": (
        {"partition.name": "natural-id", "data.client": "owner", "clients": 5}, {},
        "the training data has 4 owners for 5 clients",
    ),
    "too few examples": ({"clients": 20}, {}, "96 training examples cannot give 20 clients partition.min_size=10"),
    "a minimum too large": ({"partition.min_size": 49}, {}, "96 training examples cannot give 2 clients"),
    "a minimum that the draw does not keep": (
        {"partition.name": "dirichlet", "partition.alpha": 0.01, "partition.min_size": 20, "clients": 4}, {},
        "leaves a client with .* below partition.min_size=20",
    ),
    "more labels each than there are": (
        {"partition.name": "pathological", "partition.labels_per_client": 4}, {}, "labels_per_client=4 for 2 clients",
    ),
    "one label each, labels over": ({"partition.name": "one-label"}, {}, "one-label with 2 clients and 3 labels"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DATA)
def test_data_that_cannot_be_used(good, table, fault):
    changes, columns, message = DATA[fault]
    data = {"data.name": str(table(**columns))} if columns else {}
    with pytest.raises(DataError, match=message) as refused:
        preflight.check(configfile.build({**good, **data, **changes}))
    assert "\n" not in str(refused.value)


MODEL = {
    "rank": ({"lora.rank": 17}, r"lora.rank=17 is above the smaller side of module '.*query' \(16 × 16\).* at most 16"),
    "ranks": ({"lora.ranks": [4, 40], "strategy": "flora"}, r"lora.ranks=40 is above the smaller side"),
    "a rank above the vocabulary": ({"lora.target_modules": "word_embeddings", "lora.rank": 12}, r"\(16 × 11\)"),
    "targets": ({"lora.target_modules": "quarry"}, "'quarry' matches no linear layer.*Did you mean 'query'"),
    "a target in the head": ({"lora.target_modules": "classifier"}, "'classifier' matches no linear layer"),
    "length": ({"data.max_length": 41}, "data.max_length=41, but model.name=.* at most 40 tokens"),
    "a core in an embedding": (
        {"strategy": "fed-sb", "lora.target_modules": "word_embeddings"}, "'.*word_embeddings' is no linear layer",
    ),
    "heads": ({"strategy": "ravan", "lora.rank": 6}, "strategy=ravan does not go with lora.rank=6"),
    "name": ({"model.name": "bert-tinny"}, "no such model. Did you mean 'bert-tiny'"),
}  # fmt: skip


@pytest.mark.parametrize("pooling", ["head", "mean"])
@pytest.mark.parametrize("fault", MODEL)
def test_adapters_that_do_not_fit_the_model(good, fault, pooling):
    changes, message = MODEL[fault]
    with pytest.raises(FedloraError, match=message) as refused:
        preflight.check(configfile.build({**good, "model.pooling": pooling, **changes}))
    assert isinstance(refused.value, ModelError | ConfigError)
    assert "\n" not in str(refused.value)


VOCABULARY = {
    "padding beyond the rows": (["[PAD]"], 11, "[PAD]", r"ids reach 11 \('\[PAD\]'\), but the model has 11 rows"),
    "words beyond the rows": ([], 10, "<eos>", r"ids reach 10 \('cheese'\), but the model has 10 rows"),
    "padding within": (["[PAD]"], 12, "[PAD]", None),
    "an added token that no text has": (["<image>"], 11, "<eos>", None),
    "rows to spare": ([], 64, "<eos>", None),
}


@pytest.mark.parametrize("case", VOCABULARY)
def test_tokens_that_the_embedding_has_no_row_for(good, bert, case):
    added, rows, pad, message = VOCABULARY[case]
    config = configfile.build({**good, "model.name": str(bert(*added, rows=rows, pad=pad))})
    if message is None:
        preflight.check(config)
        return
    with pytest.raises(ModelError, match=message):
        preflight.check(config)


def test_an_added_token_beyond_the_rows_that_a_text_does_hold(good, bert, table, tmp_path):
    """Known only when the texts are tokens: then at once, not as an index error of the first client."""
    texts = [f"{WORDS[i % 9]} {'<image>' if i == 5 else ''}" for i in range(ROWS)]
    config = configfile.build({**good, "model.name": str(bert("<image>")), "data.name": str(table(text=texts))})
    preflight.check(config)
    run = RunFolder.create(tmp_path / "run", config)
    with pytest.raises(ModelError, match="ids reach 11, but the model has 11 rows"):
        jobs.prepare_data(Workbench("cpu"), run.path)


def test_a_check_and_the_run_say_the_same_of_a_model(good, save, words, tmp_path):
    """The outline on the `meta` device against the model with its weights: layers, sides, targets, rows, positions."""
    for name in ("bert", "distilbert", "roberta", "gpt2", "llama"):
        folder = words(save(name, tmp_path / name, pad_token_id=1), pad="<eos>")
        for pooling in ("head", "mean"):
            config = configfile.build({**good, "model.name": str(folder), "model.pooling": pooling, "lora.rank": 2})
            found = outline.of(config.model, OBJECTIVE)
            resident = ResidentModel.build(OBJECTIVE, config.model, config.lora, ["a", "b"], 1, 0, torch.device("cpu"))
            shapes = {module: pair.shape for module, pair in resident.factors().items()}
            assert {layer.name: (layer.d_out, layer.d_in) for layer in found.targets(config.lora)} == shapes
            assert found.rows == 99
            assert found.positions == 40


def test_the_outline_is_kept_until_a_file_changes(good, bert, home, monkeypatch):
    folder = bert()
    config = ModelConfig(name=str(folder))
    first = outline.of(config, OBJECTIVE)
    made = []
    monkeypatch.setattr(outline, "_make", lambda *args: made.append(args))
    again = outline._kept.__wrapped__(config, OBJECTIVE, outline._files(folder))
    assert again == first
    assert not made
    BertConfig.from_pretrained(folder).save_pretrained(folder)
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content + " ")
    outline.of(config, OBJECTIVE)
    assert len(made) == 1


def test_what_takes_a_network_or_the_models_own_code_is_left_to_the_run(good, tmp_path):
    assert outline.of(ModelConfig(name="nobody/nothing"), OBJECTIVE) is None
    assert outline.of(ModelConfig(name=good["model.name"], trust_remote_code=True), OBJECTIVE) is None
    assert (
        preflight._surveyed("classification", configfile.build({"data.name": "nobody/nothing"}).data, None, 0, ())
        is None
    )
    found = preflight.check(configfile.build({**good, "data.name": "nobody/nothing", "model.name": "nobody/nothing"}))
    assert (found.dealt, found.layers) == (None, None)
    assert "the data was not looked at" in found.line()
    assert "the model was not looked at" in found.line()


MISSING = {
    "weights": ("model.safetensors", "its weights cannot be loaded: .* has no model.safetensors"),
    "tokenizer": ("tokenizer.json", "its tokenizer "),
    "configuration": ("config.json", "the folder has no config.json"),
}


@pytest.mark.parametrize("part", MISSING)
def test_a_model_folder_that_is_not_whole(good, tmp_path, part):
    name, message = MISSING[part]
    folder = shutil.copytree(good["model.name"], tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(ModelError, match=message):
        preflight.check(configfile.build({**good, "model.name": str(folder)}))


@pytest.mark.parametrize(("strategy", "targets", "refused"), [
    ("flora", ["shared", "q_proj"], True), ("flora", ["q_proj"], False), ("fedit", ["shared"], False),
])  # fmt: skip
def test_a_base_whose_weights_are_shared_and_would_be_changed(good, tmp_path, strategy, targets, refused):
    from transformers import BartConfig, BartForSequenceClassification

    folder = shutil.copytree(good["model.name"], tmp_path / "model")
    sides = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = BartConfig(vocab_size=20, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, eos_token_id=1, **sides)
    BartForSequenceClassification(config).save_pretrained(folder)
    changes = {"model.name": str(folder), "strategy": strategy, "lora.target_modules": targets}
    config = configfile.build({**good, **changes})
    if refused:
        with pytest.raises(ModelError, match=r"'model\.shared' shares its weight with 'model\.\w+coder\.embed_tokens'"):
            preflight.check(config)
    else:
        assert preflight.check(config).layers


def test_an_architecture_that_classifies_no_texts(good, tmp_path):
    from transformers import CLIPVisionConfig

    folder = shutil.copytree(good["model.name"], tmp_path / "model")
    CLIPVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    with pytest.raises(ModelError, match="cannot be loaded: Unrecognized configuration class"):
        preflight.check(configfile.build({**good, "model.name": str(folder)}))


def test_a_model_that_cannot_be_built_without_weights_is_left_to_the_run(good, bert, monkeypatch):
    def needs_numbers(*args, **kwargs):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_config", needs_numbers)
    config = configfile.build({**good, "model.name": str(bert(rows=13))})
    assert preflight.check(config).layers is None


def test_a_run_that_can_begin_in_one_line(good):
    name = good["data.name"]
    assert preflight.check(configfile.build(good)).line() == (
        f"fedit on {name}, 3 labels, 96 + 24 examples, 2 clients with 48; {good['model.name']}, rank 8 on 2 modules "
        "(query, value)"
    )
    uneven = configfile.build({**good, "clients": 5, "partition.min_size": 2})
    assert "5 clients with 19 to 20;" in preflight.check(uneven).line()


def test_what_was_looked_at_is_looked_at_again_only_where_it_changed(good, table, monkeypatch):
    from fedlora.data import sources

    read, real = [], sources.read
    monkeypatch.setattr(sources, "read", lambda config, seed, light: (read.append(seed), real(config, seed, light))[1])
    file = table()
    for changes in ({}, {"strategy": "svd"}, {"lora.rank": 4}, {"clients": 3}, {"data.max_length": 9}, {"seed": 1}):
        preflight.check(configfile.build({**good, "data.name": str(file), **changes}))
    assert read == [0, 1]
    file.write_text("text,label\n" + "a b,x\n" * 40)
    for _ in range(2):  # a refusal is remembered as well
        with pytest.raises(DataError, match="one class only"):
            preflight.check(configfile.build({**good, "data.name": str(file)}))
    assert read == [0, 1, 0]


@pytest.mark.parametrize("fault", [{"lora.rank": 99}, {"clients": 50}, {"data.label": "topic"}])
def test_no_folder_is_left_behind(good, tmp_path, fault):
    with pytest.raises(FedloraError):
        fedlora.train(configfile.build({**good, **fault}), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_the_runs(good, tmp_path):
    config = configfile.build(good)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match=r"cannot write .*/file/run: Not a directory"):
        preflight.before_run(config, tmp_path / "file" / "run")
    with pytest.raises(RunFolderError, match="is not empty and holds no run"):
        preflight.before_run(config, tmp_path)
    RunFolder.create(tmp_path / "other", configfile.build({**good, "seed": 1}))
    with pytest.raises(RunFolderError, match=r"another configuration \(seed was 1, is 0\)"):
        preflight.before_run(config, tmp_path / "other")
    assert preflight.before_run(config, tmp_path / "new") is not None
    assert not (tmp_path / "new").exists()


def test_a_run_whose_data_is_dealt_goes_on_without_it(good, table, tmp_path):
    file = table()
    config = configfile.build({**good, "data.name": str(file)})
    records = fedlora.train(config, tmp_path / "run")
    file.unlink()
    assert preflight.before_run(config, tmp_path / "run") is None
    assert fedlora.train(config, tmp_path / "run") == records


def test_a_set_with_natural_owners_needs_no_name_for_them(writing):
    changes = {"data.name": "wordnet-definitions", "partition.by": None, "partition.name": "natural-id", "clients": 22}
    assert preflight.check(configfile.build(writing | changes)).dealt.smallest == 84
