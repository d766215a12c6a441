import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.config import DataConfig
from fedlora.data import sources
from fedlora.errors import DataError

SHARED = os.environ.get("FEDLORA_DATA_DIR")


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(path: Path | str, seed: int = 0, **options) -> sources.LabelledText:
    return sources.load(DataConfig(name=str(path), **options), seed)


def message(path: Path | str, **options) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def texts(split):
    return list(split["text"])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_all_file_formats_give_the_same_set(tmp_path, rows, suffix):
    reference = load(write(tmp_path / "a" / "mine.jsonl", rows), client="owner")
    text = load(write(tmp_path / "b" / f"mine{suffix}", rows), client="owner")
    assert text.digest == reference.digest
    assert (text.name, text.origin, text.labels) == ("mine", "file", ("animal", "plant", "tool"))
    assert text.train.column_names == ["text", "label", "client"]
    by_text = {(row["text"], row["label"], row["owner"]) for row in rows}
    assert all((row["text"], text.labels[row["label"]], row["client"]) in by_text for row in text.train)


def test_a_json_list_is_read_like_lines(tmp_path, rows):
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    assert load(tmp_path / "mine.json").digest == load(write(tmp_path / "mine.jsonl", rows)).digest


def test_the_test_split_is_stratified_disjoint_and_drawn_by_seed(tmp_path, rows):
    numbered = [row | {"text": f"{i} {row['text']}"} for i, row in enumerate(rows)]
    path = write(tmp_path / "mine.csv", numbered)
    text = load(path, test_fraction=0.3)
    assert Counter(list(text.test["label"])) == {0: 12, 1: 9, 2: 6}
    assert sorted([*texts(text.train), *texts(text.test)]) == sorted(row["text"] for row in numbered)
    assert load(path, test_fraction=0.3).digest == text.digest
    assert texts(load(path, seed=1, test_fraction=0.3).test) != texts(text.test)


def test_a_class_with_one_example_stays_in_training(tmp_path, rows):
    text = load(write(tmp_path / "mine.csv", [*rows, {"text": "x", "label": "rare", "owner": "o"}]), test_fraction=0.9)
    assert text.labels[2] == "rare"
    assert Counter(list(text.train["label"]))[2] == 1


def test_a_folder_with_train_and_test_files(tmp_path, rows, monkeypatch):
    write(tmp_path / "sets" / "farm" / "train.csv", rows[::2])
    write(tmp_path / "sets" / "farm" / "test.jsonl", rows[1::2])
    text = load(tmp_path / "sets" / "farm")
    assert (text.name, text.origin, len(text.train), len(text.test)) == ("farm", "folder", 45, 45)
    monkeypatch.setenv("FEDLORA_DATA_DIR", str(tmp_path / "sets"))
    assert load("farm").digest == text.digest
    assert [each.name for each in sources.known() if each.origin == "data-dir" and each.available] == ["farm"]


def test_a_named_set_prefers_the_folder_in_the_data_dir(tmp_path, rows, monkeypatch):
    for split in ("train", "test"):
        write(tmp_path / "rte" / f"{split}.parquet", [row | {"text_pair": f"no {row['text']}"} for row in rows])
    monkeypatch.setenv("FEDLORA_DATA_DIR", str(tmp_path))
    assert load("rte").train.column_names == ["text", "text_pair", "label"]
    assert next(each for each in sources.known() if each.name == "rte").available


def test_whole_number_labels_are_ordered_by_value(tmp_path, rows):
    numbers = {"animal": 10, "plant": 9, "tool": -2}
    for suffix in (".csv", ".parquet"):
        path = write(tmp_path / f"mine{suffix}", [row | {"label": numbers[row["label"]]} for row in rows])
        assert load(path).labels == ("-2", "9", "10")


def test_words_that_look_like_nothing_stay_text(tmp_path, rows):
    path = write(
        tmp_path / "mine.csv", [row | {"text": "NA", "label": "null" if i % 2 else "nan"} for i, row in enumerate(rows)]
    )
    text = load(path)
    assert text.labels == ("nan", "null")
    assert set(texts(text.train)) == {"NA"}


def test_sizes_are_drawn_by_seed_from_the_whole_split(tmp_path, rows):
    for split in ("train", "test"):
        write(tmp_path / "farm" / f"{split}.csv", [row | {"text": str(i)} for i, row in enumerate(rows)])
    full, small = (load(tmp_path / "farm"), load(tmp_path / "farm", train_size=30, test_size=20))
    assert (len(small.train), len(small.test), small.labels) == (30, 20, full.labels)
    assert small.digest != full.digest
    assert small.digest == load(tmp_path / "farm", train_size=30, test_size=20).digest
    assert texts(small.train) != texts(load(tmp_path / "farm", seed=1, train_size=30).train)
    assert texts(small.train) == texts(load(tmp_path / "farm", train_size=30, test_size=5).train)


def test_declared_class_names_keep_their_order(monkeypatch, rows):
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["z", "a"]),
        }
    )
    split = datasets.Dataset.from_dict(
        {"sentence1": ["p", "q"], "sentence2": ["r", "s"], "label": [0, 1]}, features=features
    )
    hidden = split.map(lambda row: row | {"label": -1})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args: datasets.DatasetDict(train=split, validation=split, test=hidden)
    )
    text = load("rte")
    assert (text.origin, text.labels, list(text.test["label"])) == ("hub", ("z", "a"), [0, 1])
    assert list(text.train["text_pair"]) == ["r", "s"]


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (
            {},
            {"text": "texts"},
            "no column 'texts' for the text; its columns are: text, label, owner. Did you mean 'text'? Set data.text",
        ),
        ({}, {"label": "class"}, "no column 'class' for the label"),
        ({}, {"client": "ownr"}, "Did you mean 'owner'? Set data.client"),
        ({}, {"text_pair": "second"}, "no column 'second' for the text pair"),
        ({}, {"subset": "rte"}, "data.subset='rte' selects a part of a hub set"),
        ({}, {"train_size": 1}, "data.train_size=1 leaves 1 training example of one class"),
        ({"label": None}, {}, "2 of 90 examples have no label (first: row 3)"),
        ({"label": " "}, {}, "2 of 90 examples have no label (first: row 3)"),
        ({"text": None}, {}, "column 'text' of {path}: 2 of 90 examples have no text (first: row 3)"),
        ({"owner": None}, {"client": "owner"}, "2 of 90 examples have no owner"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_columns_and_cells_that_are_missing(tmp_path, rows, change, options, expected, suffix):
    for i in (2, 7):
        rows[i] = rows[i] | change
    path = write(tmp_path / f"mine{suffix}", rows)
    assert expected.format(path=path) in message(path, **options)


def test_labels_that_cannot_be_classes(tmp_path, rows):
    path = write(tmp_path / "one.csv", [row | {"label": "same"} for row in rows])
    assert "has one class only ('same' in all 90 rows)" in message(path)
    path = write(tmp_path / "ids.csv", [row | {"label": i} for i, row in enumerate(rows)])
    assert "all 90 labels differ" in message(path)
    path = write(tmp_path / "score.parquet", [row | {"label": i / 2} for i, row in enumerate(rows)])
    assert "holds fractions (0.5)" in message(path)
    path = write(tmp_path / "list.parquet", [row | {"label": ["a"]} for row in rows])
    assert "expected text; set data.label" in message(path)


def test_a_test_label_that_training_lacks(tmp_path, rows):
    write(tmp_path / "farm" / "train.csv", rows[:70])
    write(tmp_path / "farm" / "test.csv", rows)
    assert "has 20 examples of labels that no training example has (tool)" in message(tmp_path / "farm")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.csv", "", "the file is empty"),
        ("header.csv", "text,label\n", "has no rows"),
        ("ragged.csv", "text,label\na,b,c\n", "Expected 2 columns, got 3"),
        ("open.csv", 'text,label\na,b\n"c,d\ne,f\n', "line 3: a quotation mark opens a cell and none closes it"),
        (
            "twice.jsonl",
            '{"text": "a", "label": "b"}\n{"text": "a", "text": "b"}\n',
            "line 2: key 'text' is there twice",
        ),
        (
            "lfs.parquet",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "it is a pointer of Git LFS, not the file itself; fetch the file with `git lfs pull`",
        ),
        ("binary.csv", b"text,label\n\xff\xfe,b\n", "cannot read"),
        ("broken.jsonl", '{"text": "a", "label": "b"}\n{"text": \n', "line 2: Expecting value"),
        ("scalar.jsonl", "3\n", "entry 1 is int, expected an object"),
        ("nothing.jsonl", "\n", "has no rows"),
        ("not.parquet", "text", "as parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    text = message(tmp_path / name)
    assert expected in text
    assert str(tmp_path / name) in text


def test_too_few_examples_for_a_test_split(tmp_path):
    path = write(tmp_path / "two.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    assert "2 examples, too few to keep data.test_fraction=0.2" in message(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wordnet-noun", "Did you mean 'wordnet-nouns'?"),
        ("zzz", "write owner/name"),
        ("vader", "folder 'vader' in $FEDLORA_DATA_DIR, which is not set"),
        ("{tmp}/mine.txt", "ends in '.txt'; expected one of .csv"),
        ("{tmp}/mine.csw.csv", "there is no file or folder {tmp}/mine.csw.csv. Did you mean 'mine.csv'?"),
        ("{tmp}/half", "half has no test.* file (it holds: train.csv)"),
        ("", "is not a known set"),
    ],
)
def test_names_that_mean_nothing_are_refused_before_anything_is_read(tmp_path, rows, name, expected):
    write(tmp_path / "mine.csv", rows)
    write(tmp_path / "half" / "train.csv", rows)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        sources.check(DataConfig(name=name.format(tmp=tmp_path)))
    assert expected.format(tmp=tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["wordnet-nouns", "banking77", "rte", "glue", "owner/some-set_1.0"])
def test_names_that_may_mean_something_pass_the_check(name):
    sources.check(DataConfig(name=name))


def test_a_subset_that_contradicts_the_name():
    with pytest.raises(DataError, match="which stands for subset 'rte' of nyu-mll/glue"):
        sources.check(DataConfig(name="rte", subset="mrpc"))


def test_offline_the_hub_is_one_line_that_says_what_to_do():
    text = message("nobody/nothing-here")
    assert "cannot load nobody/nothing-here from the Hugging Face hub" in text
    assert "Connect to the network" in text


def test_listing_the_sets_needs_no_heavy_library():
    code = (
        "import sys; from fedlora.data import sources; sets = sources.known(); "
        "heavy = {'torch', 'datasets', 'transformers', 'pyarrow'}; "
        "print(sum(each.available for each in sets), *heavy & set(sys.modules))"
    )
    root = Path(sources.__file__).parents[2]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(root), "HOME": "/nowhere"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert found.stdout.strip() == "2"


@pytest.mark.skipif(SHARED is None, reason="FEDLORA_DATA_DIR is not set: no folder with the larger sets")
@pytest.mark.parametrize(
    ("name", "classes", "options"),
    [("reuters-r8", 8, {}), ("vader", 2, {"client": "domain"}), ("rte", 2, {}), ("banking77", 77, {"train_size": 500})],
)
def test_the_sets_of_the_data_dir(monkeypatch, name, classes, options):
    monkeypatch.setenv("FEDLORA_DATA_DIR", SHARED)
    text = load(name, **options)
    assert (text.origin, len(text.labels)) == ("folder", classes)
    assert ("client" in text.train.column_names) == ("client" in options)
    assert ("text_pair" in text.train.column_names) == (name == "rte")
