import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest

from fedlora.config import DataConfig
from fedlora.data import sources, tokens
from fedlora.errors import DataError


@pytest.fixture
def path(tmp_path, rows):
    found = tmp_path / "mine.jsonl"
    found.write_text("\n".join(json.dumps(row | {"second": "not " + row["text"]}) for row in rows))
    return found


@pytest.fixture
def text(path):
    return sources.load(DataConfig(name=str(path), client="owner"), seed=0)


def test_tokens_are_those_of_the_tokenizer_cut_and_not_padded(text, tokenizer, tmp_path):
    data = tokens.open_tokens(tokens.tokenise(text, tokenizer, 6, tmp_path / "cache"))
    assert data.train.column_names == ["input_ids", "label", "length", "client"]
    for row, source in zip(data.train.to_pylist(), text.train, strict=True):
        assert row["input_ids"] == tokenizer(source["text"], truncation=True, max_length=6)["input_ids"]
        assert (row["length"], row["label"], row["client"]) == (
            len(row["input_ids"]),
            source["label"],
            source["client"],
        )
    assert set(data.train["length"].to_pylist()) == {3, 4, 5, 6}
    assert (data.labels, data.digest, data.pad_token_id, data.padding_side) == (text.labels, text.digest, 0, "right")
    assert list(tokens.label_array(data.test)) == list(text.test["label"])
    assert tokens.client_array(data.test) == list(text.test["client"])


def test_pairs_have_token_types(path, tokenizer, tmp_path):
    text = sources.load(DataConfig(name=str(path), text_pair="second"), seed=0)
    data = tokens.open_tokens(tokens.tokenise(text, tokenizer, 8, tmp_path / "cache"))
    expected = tokenizer(text.test["text"][0], text.test["text_pair"][0], truncation=True, max_length=8)
    found = tokens.examples(data.test, [0])
    assert found.input_ids[0].tolist() == expected["input_ids"]
    assert found.token_type_ids[0].tolist() == expected["token_type_ids"]
    assert 1 in found.token_type_ids[0]
    assert tokens.client_array(data.test) is None


def test_the_cache_is_reused_and_nothing_else_is_left_in_it(text, tokenizer, tmp_path):
    first = tokens.tokenise(text, tokenizer, 16, tmp_path)
    made = (first / "meta.json").stat().st_mtime_ns
    tokenizer(["something else"], padding="max_length", truncation=True, max_length=7)
    assert tokens.tokenise(text, tokenizer, 16, tmp_path) == first
    assert (first / "meta.json").stat().st_mtime_ns == made
    assert [each.name for each in tmp_path.glob("*tokens*")] == [first.name]


def test_the_name_depends_on_text_length_and_tokenizer(text, path, tokenizer, tmp_path):
    other_text = sources.load(DataConfig(name=str(path), client="owner", train_size=50), seed=0)
    other_tokenizer = type(tokenizer)(vocab={**tokenizer.get_vocab(), "zzz": tokenizer.vocab_size})
    paths = {
        tokens.tokenise(text, tokenizer, 16, tmp_path),
        tokens.tokenise(text, tokenizer, 12, tmp_path),
        tokens.tokenise(other_text, tokenizer, 16, tmp_path),
        tokens.tokenise(text, other_tokenizer, 16, tmp_path),
    }
    assert len(paths) == 4


def test_writers_at_the_same_time_agree(text, tokenizer, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: tokens.tokenise(text, tokenizer, 16, tmp_path / "cache"), range(4)))
    assert list((tmp_path / "cache").iterdir()) == list(paths)
    assert len(tokens.open_tokens(paths.pop()).train) == len(text.train)


@pytest.mark.parametrize("damage", ["meta.json", "train.arrow", "test.arrow"])
def test_what_is_damaged_is_refused_and_made_again(text, tokenizer, tmp_path, damage):
    path = tokens.tokenise(text, tokenizer, 16, tmp_path)
    target = path / damage
    target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    with pytest.raises(DataError, match="is damaged"):
        tokens.open_tokens(path)
    assert tokens.tokenise(text, tokenizer, 16, tmp_path) == path
    assert tokens.open_tokens(path).test["label"].to_pylist() == list(text.test["label"])


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        tokens.open_tokens(tmp_path / "tokens-0")


def test_a_cache_that_cannot_be_written(text, tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="Set FEDLORA_HOME"):
        tokens.tokenise(text, tokenizer, 16, tmp_path / "file")


def test_an_empty_text_of_a_tokenizer_without_special_tokens_keeps_one_position(text, tokenizer, tmp_path):
    class Bare:
        model_input_names = ("input_ids",)
        pad_token_id, eos_token_id, padding_side = None, 7, "left"

        def get_vocab(self):
            return {"a": 0}

        def __call__(self, texts, pairs, **options):
            return {"input_ids": [[] for _ in texts]}

    data = tokens.open_tokens(tokens.tokenise(text, Bare(), 16, tmp_path))
    assert (data.train["input_ids"][0].as_py(), data.train["length"][0].as_py()) == ([7], 1)
    assert (data.pad_token_id, data.padding_side) == (7, "left")


def test_examples_come_in_the_order_asked_for(text, tokenizer, tmp_path):
    data = tokens.open_tokens(tokens.tokenise(text, tokenizer, 16, tmp_path))
    found = tokens.examples(data.train, np.array([5, 0, 71]))
    assert [ids.tolist() for ids in found.input_ids] == [data.train["input_ids"][i].as_py() for i in (5, 0, 71)]
    assert found.labels.tolist() == [data.train["label"][i].as_py() for i in (5, 0, 71)]
    assert found.lengths.tolist() == [len(ids) for ids in found.input_ids]
    assert found.token_type_ids is None
    assert len(tokens.examples(data.train, [])) == 0


def test_rows_of_many_batches_are_those_of_the_whole_table(text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_ROWS_AT_A_TIME", 7)
    data = tokens.open_tokens(tokens.tokenise(text, tokenizer, 16, tmp_path))
    assert data.train["label"].num_chunks == 11
    rows = np.random.default_rng(0).integers(0, 72, 40)  # in no order, some twice
    whole = data.train.take(rows)
    found = tokens.examples(data.train, rows)
    assert [ids.tolist() for ids in found.input_ids] == whole["input_ids"].to_pylist()
    assert found.labels.tolist() == whole["label"].to_pylist()
    again = datasets.Dataset.from_file(str(data.path / "train.arrow"))  # the format is an open one
    assert again["input_ids"] == data.train["input_ids"].to_pylist()


@pytest.mark.parametrize("row", [-1, 72])
def test_rows_of_another_data_set_are_refused(text, tokenizer, tmp_path, row):
    data = tokens.open_tokens(tokens.tokenise(text, tokenizer, 16, tmp_path))
    with pytest.raises(DataError, match=rf"row {row} of a split with 72 rows"):
        tokens.examples(data.train, [0, row])


def test_the_name_of_the_set_is_kept_apart(text, tokenizer, tmp_path):
    renamed = dataclasses.replace(text, name="other")
    for each in (text, renamed):
        assert tokens.open_tokens(tokens.tokenise(each, tokenizer, 16, tmp_path)).name == each.name
