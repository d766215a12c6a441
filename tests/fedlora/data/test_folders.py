"""Folders as people have them: any case, numbered parts, validation splits, what `save_to_disk` writes."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.config import DataConfig, PartitionConfig
from fedlora.data.partition import Split, partition
from fedlora.data.sources import known, load, read
from fedlora.data.survey import survey
from fedlora.errors import DataError


def surveyed(config, seed):
    return survey(config, lambda light: read(config, seed, light))


def table(start: int, stop: int) -> pa.Table:
    numbers = range(start, stop)
    return pa.table({"text": [f"text {i}" for i in numbers], "label": ["ab"[i % 2] for i in numbers]})


def put(path, start, stop) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".csv":
        table(start, stop).to_pandas().to_csv(path, index=False)
    else:
        pq.write_table(table(start, stop), path)


WHOLE = {"train.parquet": (0, 40), "test.parquet": (40, 50)}
LAYOUTS = {
    "in capitals": {"Train.csv": (0, 40), "TEST.CSV": (40, 50)},
    "parts": {
        "train-00001-of-00002.parquet": (15, 40),
        "train-00000-of-00002.parquet": (0, 15),
        "test-00000-of-00001.parquet": (40, 50),
    },
    "as on the hub": {"data/train-00000-of-00001.parquet": (0, 40), "data/test-00000-of-00001.parquet": (40, 50)},
    "validation": {"train.parquet": (0, 40), "validation.parquet": (40, 50)},
    "val": {"train.parquet": (0, 40), "val.csv": (40, 50)},
    "validation beside test": {**WHOLE, "validation.parquet": (50, 90)},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_is_read_however_its_files_are_called(tmp_path, name):
    for folder, files in {"whole": WHOLE, "other": LAYOUTS[name]}.items():
        for file, (start, stop) in files.items():
            put(tmp_path / folder / file, start, stop)
    whole, other = (load(DataConfig(name=str(tmp_path / folder)), 0) for folder in ("whole", "other"))
    assert other.digest == whole.digest
    told = [note for note in other.notes if "is used for testing" in note]
    assert told == ([f"there is no test split: {name} is used for testing"] if name in ("validation", "val") else [])


def test_a_missing_part_is_named(tmp_path):
    put(tmp_path / "train-00000-of-00003.parquet", 0, 4)
    put(tmp_path / "train-00002-of-00003.parquet", 4, 8)
    put(tmp_path / "test.parquet", 8, 12)
    with pytest.raises(DataError, match="has 2 of the 3 parts of its train split"):
        load(DataConfig(name=str(tmp_path)), 0)


def test_parts_with_other_columns_are_refused(tmp_path):
    put(tmp_path / "train-00000-of-00002.parquet", 0, 4)
    pq.write_table(pa.table({"text": [["a"]], "label": ["a"]}), tmp_path / "train-00001-of-00002.parquet")
    put(tmp_path / "test.parquet", 8, 12)
    with pytest.raises(DataError, match="the parts do not have the same columns"):
        load(DataConfig(name=str(tmp_path)), 0)


@pytest.mark.parametrize("test_split", ["test", "validation", None])
def test_what_save_to_disk_writes_is_read(tmp_path, monkeypatch, test_split):
    train = datasets.Dataset(table(0, 40))
    saved = datasets.DatasetDict({"train": train, test_split: datasets.Dataset(table(40, 50))}) if test_split else train
    saved.save_to_disk(tmp_path / "sets" / "mine")
    put(tmp_path / "whole" / "train.parquet", 0, 40)
    put(tmp_path / "whole" / "test.parquet", 40, 50)
    text = load(DataConfig(name=str(tmp_path / "sets" / "mine")), 0)
    if test_split:
        assert text.digest == load(DataConfig(name=str(tmp_path / "whole")), 0).digest
    else:
        assert (len(text.train), len(text.test)) == (32, 8)
    monkeypatch.setenv("FEDLORA_DATA_DIR", str(tmp_path / "sets"))
    assert "mine" in {each.name for each in known()}


def test_a_damaged_one_is_one_line(tmp_path):
    datasets.Dataset(table(0, 4)).save_to_disk(tmp_path / "mine")
    (tmp_path / "mine" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*mine as a folder of save_to_disk") as caught:
        load(DataConfig(name=str(tmp_path / "mine")), 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("sizes", [{}, {"train_size": 20, "test_size": 5}])
def test_a_survey_sees_the_rows_that_a_run_gets(tmp_path, rows, monkeypatch, light, suffix, sizes):
    path = tmp_path / f"mine{suffix}"
    frame = pa.Table.from_pylist(rows).to_pandas()
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    if light:
        monkeypatch.setattr("fedlora.data.survey._SMALL", 0)
    config = DataConfig(name=str(path), client="owner", **sizes)
    seen, text = surveyed(config, 3), load(config, 3)
    assert seen.labels == text.labels
    for split in ("train", "test"):
        assert getattr(seen, split).tolist() == list(getattr(text, split)["label"])
        assert getattr(seen, f"{split}_clients") == list(getattr(text, split)["client"])
    assert seen.notes == text.notes


@pytest.mark.parametrize("light", [False, True])
@pytest.mark.parametrize("options", [{"text": "texts"}, {"label": "owner", "client": "x"}, {"train_size": 1}])
def test_and_refuses_what_a_run_refuses(tmp_path, rows, monkeypatch, light, options):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")
    config = DataConfig(name=str(tmp_path / "mine.parquet"), **options)
    if light:
        monkeypatch.setattr("fedlora.data.survey._SMALL", 0)
    with pytest.raises(DataError) as expected:
        load(config, 0)
    with pytest.raises(DataError) as got:
        surveyed(config, 0)
    assert str(got.value) == str(expected.value)


def test_a_set_of_the_hub_is_not_surveyed():
    assert surveyed(DataConfig(name="nobody/nothing-here"), 0) is None


def test_the_packaged_set_is_the_one_that_finished_runs_were_made_on():
    text, config = load(DataConfig(name="wordnet-nouns"), 0), PartitionConfig()
    assert text.digest == "aa3dfd4186c42fe7"
    train, test = (Split(list(split["label"])) for split in (text.train, text.test))
    assert partition(config, 10, 0, train, test, text.labels, text.digest).hash == "10a211b561876ae5"  # the demo's


def split(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": [f"text {i}" for i in range(len(labels))], "label": labels})
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("hidden", [-1, None])
def test_a_test_split_without_labels_makes_way_for_validation(tmp_path, hidden):
    split(tmp_path / "train.parquet", [0, 1] * 10)
    split(tmp_path / "validation.parquet", [0, 1] * 3)
    split(tmp_path / "test.parquet", pa.array([hidden] * 9, pa.int64()))
    text = load(DataConfig(name=str(tmp_path)), 0)
    assert len(text.test) == 6
    assert "test.parquet has no labels: validation.parquet is used for testing" in text.notes
    split(tmp_path / "test.parquet", [0, 1, -1])
    with pytest.raises(DataError, match="labels that no training example has"):
        load(DataConfig(name=str(tmp_path)), 0)


def test_parts_of_a_training_split_alone_have_a_test_split_drawn(tmp_path):
    for part in range(2):
        split(tmp_path / "data" / f"train-0000{part}-of-00002.parquet", [0, 1] * 10)
    config = DataConfig(name=str(tmp_path))
    text = load(config, 0)
    assert (len(text.train), len(text.test)) == (32, 8)
    assert surveyed(config, 0).train.tolist() == list(text.train["label"])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def test_a_pointer_in_a_saved_folder_is_named(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).save_to_disk(str(tmp_path / "set"))
    next((tmp_path / "set").glob("*.arrow")).write_text(POINTER)
    with pytest.raises(DataError, match=r"\.arrow is a pointer of Git LFS.*git lfs pull"):
        load(DataConfig(name=str(tmp_path / "set")), 0)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("d.csv.gz", "unpack it"), ("d.xlsx", "save it as csv"), ("d.arrow", "give the folder that save_to_disk wrote")],
)
def test_a_file_of_another_kind_is_refused_with_the_conversion(tmp_path, name, advice):
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=advice):
        load(DataConfig(name=str(tmp_path / name)), 0)
