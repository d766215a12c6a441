"""The splits of a source as they are: the user's files and folders, packaged sets, sets of the Hugging Face hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.data.catalogue import VALIDATION, Source, saved_by_datasets, split_files
from fedlora.errors import DataError, counted
from fedlora.files.limits import is_pointer

if TYPE_CHECKING:  # `fedlora datasets` imports this module and needs none of these
    from pathlib import Path

    import datasets

    from fedlora.data.columns import RawSplit


def read(source: Source, only: set[str] | None = None, label: str | None = None) -> tuple[RawSplit, RawSplit | None]:
    """The training and the test split; no test split for a single file and for sets without a usable one.

    Args:
        source: where they are.
        only: columns to keep in memory, where the source is files; None: all.
        label: column that a test split must have values in, since benchmarks publish some without; None: no matter.

    Raises:
        DataError: they cannot be read.
    """
    if source.path is None:
        return _of_splits(_download(source), source, label)
    if source.origin == "file":
        return _of_files((source.path,), only), None
    if saved_by_datasets(source.path):
        return _of_splits(_saved(source.path), source, label)
    return _of_folder(source.path, only, label)


def _of_folder(folder: Path, only: set[str] | None, label: str | None) -> tuple[RawSplit, RawSplit | None]:
    from fedlora.data.columns import is_unlabelled

    files = split_files(folder)
    train = _of_files(files.train, only, files.notes)
    if not files.test:
        return train, None
    test = _of_files(files.test, only)
    if files.validation and label and is_unlabelled(test, label):
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


def _of_splits(splits: Any, source: Source, label: str | None) -> tuple[RawSplit, RawSplit | None]:
    """The training and the test split of a set that the `datasets` library has read."""
    train = "train" if "train" in splits else next(iter(splits))
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


def _is_labelled(split: datasets.Dataset, label: str | None) -> bool:
    """Whether a split has labels: benchmarks publish theirs as -1."""
    return label not in split.column_names or (len(split) > 0 and split[0][label] not in (-1, None))


def _raw(
    split: datasets.Dataset, source: Source, name: str, label: str | None, notes: tuple[str, ...] = ()
) -> RawSplit:
    from fedlora.data.columns import RawSplit

    feature = split.features.get(label or "")
    names = getattr(feature, "names", None)
    where = f"{source.hub or source.path} {name}"
    table = split.with_format("arrow")[:]
    if names and label in table.column_names:
        unlabelled = int(np.sum(np.asarray(table[label].fill_null(-1)) < 0))
        if unlabelled:
            raise DataError(f"{where}: {unlabelled} of {counted(len(split), 'example')} have no label")
    return RawSplit(table, where, tuple(names) if names else None, notes)
