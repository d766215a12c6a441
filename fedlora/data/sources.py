"""Loads labelled text: packaged sets, the user's files and folders, and sets of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedlora.config import DataConfig
from fedlora.data.apportion import largest_remainder
from fedlora.data.catalogue import VALIDATION, KnownSet, Source, check, known, resolve, saved_by_datasets, split_files
from fedlora.errors import DataError, counted
from fedlora.files.limits import is_pointer

if TYPE_CHECKING:  # `fedlora datasets` imports this module and needs none of these
    from pathlib import Path

    import datasets
    import pyarrow as pa

    from fedlora.data.columns import RawSplit

__all__ = ["KnownSet", "LabelledText", "check", "known", "load"]


@dataclass(frozen=True)
class LabelledText:
    """Text for classification, in memory, with a training and a test split.

    Both splits have the columns `text` (string), `label` (int64, an index into `labels`) and, as configured,
    `text_pair` and `client` (strings).
    """

    name: str
    origin: str
    """`packaged`, `file`, `folder` or `hub`."""
    tables: dict[Literal["train", "test"], pa.Table]
    labels: tuple[str, ...]
    """Names of the classes: as declared by a hub set, otherwise sorted, whole numbers by value."""
    digest: str
    """Hash of the content of both splits."""
    notes: tuple[str, ...] = ()
    """What was read, and what a reader did besides: rows of each file, blank lines, quoting, the split for testing."""

    @cached_property
    def train(self) -> datasets.Dataset:
        """The training split for whoever looks at it; runs use `tables`, and so need not import the library."""
        return self._dataset("train")

    @cached_property
    def test(self) -> datasets.Dataset:
        """The test split."""
        return self._dataset("test")

    def _dataset(self, split: Literal["train", "test"]) -> datasets.Dataset:
        import datasets
        from datasets.table import InMemoryTable

        return datasets.Dataset(InMemoryTable(self.tables[split]))


def load(config: DataConfig, seed: int) -> LabelledText:
    """Read what the configuration names, check every row, and draw the subsamples and the test split it asks for.

    Raises:
        DataError: nothing of that name; a column, label or text is missing; fewer than two classes; a test label that
            training has not; an unreadable file. Always one line that names what to change.
    """
    draft = read(config, seed)
    return LabelledText(
        draft.source.name,
        draft.source.origin,
        {"train": draft.train, "test": draft.test},
        draft.labels,
        _digest(draft.train, draft.test, draft.labels),
        draft.notes,
    )


@dataclass(frozen=True)
class Draft:
    """A set as it is read, checked and cut, before its content has been hashed."""

    source: Source
    train: pa.Table
    test: pa.Table
    labels: tuple[str, ...]
    notes: tuple[str, ...]


def read(config: DataConfig, seed: int, light: bool = False) -> Draft:
    """Read and check the rows, and draw the subsamples and the test split.

    Args:
        config: names the set and its columns.
        seed: of the run.
        light: keep labels and owners only, so that large files take little memory; texts are not looked at.

    Raises:
        DataError: as `load`.
    """
    from fedlora.data import columns

    source = resolve(config)
    wanted = columns.column_names(config, source.columns)
    names = {ours: theirs for ours, theirs in wanted.items() if not light or ours in ("label", "client")}
    raw_train, raw_test = _read(source, config, set(names.values()) if light else None, names)
    if light and any(raw_train.columns.count(theirs) != 1 for theirs in wanted.values()):
        return read(config, seed)  # which says what is wrong
    notes = [*raw_train.told(), *(raw_test.told() if raw_test else [])]
    raw_train = columns.choose(raw_train, names)
    labels = columns.class_names(raw_train)
    train = columns.encode(raw_train, labels)
    if raw_test is None:
        train, test = _split(train, len(labels), config.test_fraction, seed, raw_train.where)
        notes.append(f"{len(test)} of {len(train) + len(test)} rows are kept for testing (data.test_fraction)")
    else:
        test = columns.encode(columns.choose(raw_test, names), labels)
    train = _subsample(train, config.train_size, seed, "data/train")
    test = _subsample(test, config.test_size, seed, "data/test")
    _require_two_classes(train, config)
    return Draft(source, train, test, labels, tuple(notes))


def _read(
    source: Source, config: DataConfig, only: set[str] | None, names: dict[str, str]
) -> tuple[RawSplit, RawSplit | None]:
    """The splits as they are; no test split for a single file and for sets without a labelled one."""
    if source.path is None:
        return _of_splits(_download(source), source, config)
    if source.origin == "file":
        return _of_files((source.path,), only), None
    if saved_by_datasets(source.path):
        return _of_splits(_saved(source.path), source, config)
    return _of_folder(source.path, only, names["label"])


def _of_folder(folder: Path, only: set[str] | None, label: str) -> tuple[RawSplit, RawSplit | None]:
    from fedlora.data.columns import is_unlabelled

    files = split_files(folder)
    train = _of_files(files.train, only, files.notes)
    if not files.test:
        return train, None
    test = _of_files(files.test, only)
    if files.validation and is_unlabelled(test, label):
        note = f"{files.test[0].name} has no labels: {files.validation[0].name} is used for testing"
        test = _of_files(files.validation, only, (note,))
    return train, test


def _of_files(paths: tuple[Path, ...], only: set[str] | None, notes: tuple[str, ...] = ()) -> RawSplit:
    """One split from its file, or from its numbered parts."""
    import pyarrow as pa

    from fedlora.data.columns import RawSplit
    from fedlora.data.files import read_table

    parts = [read_table(path, only) for path in paths]
    where = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} parts of {paths[0].name[:5]})"
    try:
        table = pa.concat_tables([part.table for part in parts], promote_options="permissive") if parts[1:] else None
    except pa.ArrowException as error:
        raise DataError(f"{where}: the parts do not have the same columns ({' '.join(str(error).split())})") from error
    told = [f"{path.name}: {note}" for path, part in zip(paths, parts, strict=True) for note in part.notes]
    return RawSplit(table or parts[0].table, where, notes=(*told, *notes), columns=parts[0].columns)


def _saved(folder: Path) -> Any:
    """What `save_to_disk` has written, by split."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged in any way
        reason = " ".join(str(error).split())[:200]
        if pointer := next(filter(is_pointer, folder.rglob("*.arrow")), None):
            reason = f"{pointer.name} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"
        raise DataError(f"cannot read {folder} as a folder of save_to_disk: {reason}. Write it again") from error
    return saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}


def _of_splits(splits: Any, source: Source, config: DataConfig) -> tuple[RawSplit, RawSplit | None]:
    """The training and the test split of a set that the `datasets` library has read."""
    train = "train" if "train" in splits else next(iter(splits))
    label = source.columns.get("label", "label") if config.label == "label" else config.label
    for name in ("test", *VALIDATION):
        if name in splits and name != train and _is_labelled(splits[name], label):
            notes = () if name == "test" else (f"there is no labelled test split: {name} is used for testing",)
            return _raw(splits[train], source, train, label), _raw(splits[name], source, name, label, notes)
    return _raw(splits[train], source, train, label), None


def _download(source: Source) -> Any:
    import datasets

    try:
        try:
            return datasets.load_dataset(source.hub, source.subset)
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            # Sets that were published as a program have a copy as plain files, made by the hub.
            return datasets.load_dataset(source.hub, source.subset, revision="refs/convert/parquet")
    except Exception as error:  # whatever the hub, the network or a broken set throws is the user's to mend
        raise DataError(_hub_failure(source, error)) from error


def _hub_failure(source: Source, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    if isinstance(error, ConnectionError):
        cure = "Connect to the network, or put train.parquet and test.parquet into a folder and set data.name to it"
    elif "onfig name is missing" in reason:
        cure = "Set data.subset to one of them"
    else:
        cure = "Check data.name and data.subset, or choose a set of `fedlora datasets`"
    what = f"{source.hub} ({source.subset})" if source.subset else source.hub
    return f"data.name={source.name!r}: cannot load {what} from the Hugging Face hub ({reason}). {cure}"


def _is_labelled(split: datasets.Dataset, label: str) -> bool:
    """Whether a split has labels: benchmarks publish theirs as -1."""
    return label not in split.column_names or (len(split) > 0 and split[0][label] not in (-1, None))


def _raw(split: datasets.Dataset, source: Source, name: str, label: str, notes: tuple[str, ...] = ()) -> RawSplit:
    from fedlora.data.columns import RawSplit

    feature = split.features.get(label)
    names = getattr(feature, "names", None)
    where = f"{source.hub or source.path} {name}"
    table = split.with_format("arrow")[:]
    if names and label in table.column_names:
        unlabelled = int(np.sum(np.asarray(table[label].fill_null(-1)) < 0))
        if unlabelled:
            raise DataError(f"{where}: {unlabelled} of {counted(len(split), 'example')} have no label")
    return RawSplit(table, where, tuple(names) if names else None, notes)


def _split(data: pa.Table, classes: int, fraction: float, seed: int, where: str) -> tuple[pa.Table, pa.Table]:
    """A training and a test split, stratified; a class keeps at least one training example."""
    from fedlora.seeds import numpy_generator

    generator = numpy_generator(seed, "data/split")
    labels = data["label"].to_numpy()
    sizes = np.bincount(labels, minlength=classes)
    wanted = max(1, round(fraction * len(labels)))
    counts = np.minimum(largest_remainder(wanted, sizes), np.maximum(sizes - 1, 0))
    if counts.sum() == 0:
        raise DataError(
            f"{where} has {counted(len(labels), 'example')}, too few to keep "
            f"data.test_fraction={fraction} of them for testing; add examples, or give a folder with train and test "
            "files"
        )
    shuffled = [generator.permutation(np.flatnonzero(labels == label)) for label in range(classes)]
    test = np.sort(np.concatenate([rows[:count] for rows, count in zip(shuffled, counts, strict=True)]))
    train = np.setdiff1d(np.arange(len(labels)), test)
    return data.take(train), data.take(test)


def _subsample(data: pa.Table, size: int | None, seed: int, purpose: str) -> pa.Table:
    from fedlora.seeds import numpy_generator

    if size is None or size >= len(data):
        return data
    return data.take(np.sort(numpy_generator(seed, purpose).permutation(len(data))[:size]))


def _require_two_classes(train: pa.Table, config: DataConfig) -> None:
    if len(train["label"].unique()) < 2:
        raise DataError(
            f"data.train_size={config.train_size} leaves {counted(len(train), 'training example')} of one class, "
            "expected at least two classes; raise data.train_size"
        )


def _digest(train: pa.Table, test: pa.Table, labels: tuple[str, ...]) -> str:
    digest = hashlib.sha256(json.dumps(labels).encode())
    for split in (train, test):
        for column in sorted(split.column_names):
            digest.update(json.dumps([column, len(split)]).encode())
            for start in range(0, len(split), 10_000):
                digest.update(json.dumps(split[column][start : start + 10_000].to_pylist()).encode())
    return digest.hexdigest()[:16]
