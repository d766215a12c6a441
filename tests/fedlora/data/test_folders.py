"""Folders as people have them: any case, numbered parts, validation splits, what `save_to_disk` writes."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedlora.config import DataConfig
from fedlora.data.sources import known, load
from fedlora.data.survey import survey
from fedlora.errors import DataError


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
    seen, text = survey(config, 3), load(config, 3)
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
        survey(config, 0)
    assert str(got.value) == str(expected.value)


def test_a_set_of_the_hub_is_not_surveyed():
    assert survey(DataConfig(name="nobody/nothing-here"), 0) is None


def test_the_packaged_set_is_the_one_that_finished_runs_were_made_on():
    assert load(DataConfig(name="wordnet-nouns"), 0).digest == "aa3dfd4186c42fe7"
