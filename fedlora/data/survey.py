"""What a data set holds, for the checks before a run: classes and owners of the rows that the run will have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedlora.config import DataConfig
from fedlora.data.catalogue import Source, resolve, saved_by_datasets, split_files
from fedlora.data.sources import Draft

_SMALL = 32 * 2**20
"""Bytes of files that are read whole, texts too: some tenths of a second."""
_JSON = 200 * 2**20
"""Bytes of JSON that are read before a run starts; it cannot be read by column."""


@dataclass(frozen=True, eq=False)
class Survey:
    """Labels and owners of a run's rows, in the order and selection of `sources.load`."""

    labels: tuple[str, ...]
    """Names of the classes."""
    train: npt.NDArray[np.int64]
    """Class index of every training row."""
    test: npt.NDArray[np.int64]
    """Class index of every test row."""
    train_clients: list[str] | None
    """Owner of every training row; None without `data.client`."""
    test_clients: list[str] | None
    notes: tuple[str, ...]
    """What was read, a line each."""


def survey(config: DataConfig, draft_of: Callable[[bool], Draft]) -> Survey | None:
    """Read labels and owners; None where that takes a network or long (large JSON), so that the run itself will tell.

    Args:
        config: names the data.
        draft_of: reads them; whether labels and owners alone will do.

    Raises:
        DataError: what `sources.load` would raise; for large files without a look at the texts.
    """
    source = resolve(config)
    files = _files(source)
    size = sum(file.stat().st_size for file in files)
    if source.path is None or (size > _JSON and any(file.suffix.lower().startswith(".json") for file in files)):
        return None
    draft = draft_of(size > _SMALL)
    splits = (draft.train, draft.test)
    owners = [split["client"].to_pylist() if "client" in split.column_names else None for split in splits]
    classes = [split["label"].to_numpy() for split in splits]
    return Survey(draft.labels, classes[0], classes[1], owners[0], owners[1], draft.notes)


def _files(source: Source) -> list[Path]:
    if source.path is None:
        return []
    if source.path.is_file():
        return [source.path]
    if saved_by_datasets(source.path):
        return [path for path in source.path.rglob("*") if path.is_file()]
    found = split_files(source.path)
    return [*found.train, *found.test]
