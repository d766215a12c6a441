"""Loads labelled text: packaged sets, the user's files and folders, and sets of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedlora.config import DataConfig
from fedlora.data import splits
from fedlora.data.apportion import largest_remainder
from fedlora.data.catalogue import KnownSet, Source, check, known, resolve
from fedlora.errors import DataError, counted

if TYPE_CHECKING:  # `fedlora datasets` imports this module and needs none of these
    import datasets
    import pyarrow as pa

__all__ = ["KnownSet", "LabelledText", "check", "known", "load"]


@dataclass(frozen=True)
class LabelledText:
    """Text in memory, with a training and a test split.

    For classification both splits have the columns `text` (string), `label` (int64, an index into `labels`) and, as
    configured, `text_pair` and `client` (strings). Texts with a number (`fedlora.data.numbers`) have it as `value`, of
    dialogues (`fedlora.data.dialogues`) `messages` are the text; the label of both is the group that a partition goes
    by.
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
    return finish(read(config, seed))


def finish(draft: Draft) -> LabelledText:
    """A draft with the digest of its content."""
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
    raw_train, raw_test = splits.read(source, set(names.values()) if light else None, names["label"])
    if light and any(raw_train.columns.count(theirs) != 1 for theirs in wanted.values()):
        return read(config, seed)  # which says what is wrong
    notes = [*raw_train.told(), *(raw_test.told() if raw_test else [])]
    raw_train = columns.choose(raw_train, names)
    labels = columns.class_names(raw_train)
    train = columns.encode(raw_train, labels)
    test = columns.encode(columns.choose(raw_test, names), labels) if raw_test else None
    train, test, told = drawn(train, test, len(labels), config, seed, raw_train.where)
    _require_two_classes(train, config)
    return Draft(source, train, test, labels, (*notes, *told))


def drawn(
    train: pa.Table, test: pa.Table | None, classes: int, config: DataConfig, seed: int, where: str
) -> tuple[pa.Table, pa.Table, list[str]]:
    """The rows that a configuration asks for of both splits, and what is to be said of it.

    Args:
        train: with a column `label` of class indices.
        test: None where the source has none: then it is split off.
        classes: how many there are.
        config: says how many rows, and which share for testing.
        seed: of the run.
        where: the training rows are from.

    Raises:
        DataError: as `split_off`.
    """
    told = []
    if test is None:
        train, test = split_off(train, classes, config.test_fraction, seed, where)
        told = [f"{len(test)} of {len(train) + len(test)} rows are kept for testing (data.test_fraction)"]
    train = subsample(train, config.train_size, seed, "data/train")
    return train, subsample(test, config.test_size, seed, "data/test"), told


def split_off(data: pa.Table, classes: int, fraction: float, seed: int, where: str) -> tuple[pa.Table, pa.Table]:
    """A training and a test split, stratified; a class keeps at least one training example.

    Raises:
        DataError: there are too few rows.
    """
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


def subsample(data: pa.Table, size: int | None, seed: int, purpose: str) -> pa.Table:
    """At most `size` rows, drawn by seed and purpose, in their order."""
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
