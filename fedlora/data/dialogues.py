"""Dialogues to learn from: a prompt with its response, Alpaca's columns, or chat messages; read into one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.config import DataConfig
from fedlora.data import forms, groups, likeness, sources, splits
from fedlora.data.catalogue import resolve
from fedlora.data.messages import ROLES, Message, understood
from fedlora.data.sources import Draft
from fedlora.errors import counted

if TYPE_CHECKING:
    import pyarrow as pa

    from fedlora.data.columns import RawSplit

__all__ = ["ROLES", "Message", "read"]


def read(config: DataConfig, by: str | None, seed: int) -> Draft:
    """Read and check the rows, and draw the subsamples and the test split: `messages` (a list of role and content),
    `label` (an index into the labels, the values of the column `by`; one for all without it) and, as configured,
    `client`; where the set has them, the lists of texts `tests` and `options`. Only rows that are drawn are checked.

    Raises:
        DataError: nothing of that name; no columns that hold dialogues; an empty response; an unreadable file.
    """
    source = resolve(config)
    raw_train, raw_test = splits.read(source)
    notes = [*raw_train.told(), *(raw_test.told() if raw_test else [])]
    for split in (raw_train, raw_test):
        if split:
            forms.of(split, config, source.columns)  # a column that is missing comes before a row that is
    by, alike = (None, like) if (like := likeness.asked(by)) else (by, None)
    labels = groups.names(raw_train, by)
    picked = groups.rows(raw_train, by, labels)
    others = groups.rows(raw_test, by, labels) if raw_test else None
    picked, others, kept = sources.drawn(picked, others, len(labels), config, seed, raw_train.where)
    train, told = _table(raw_train, config, source.columns, picked)
    test, more = _table(raw_test or raw_train, config, source.columns, others)
    if alike:
        labels, train, test = _by_likeness(alike, train, test, seed)
    return Draft(source, train, test, labels, (*notes, *kept, *told, *more))


def _by_likeness(
    asked: likeness.Asked, train: pa.Table, test: pa.Table, seed: int
) -> tuple[tuple[str, ...], pa.Table, pa.Table]:
    """Both splits with groups that no column names for labels."""
    import pyarrow as pa

    said = [split["messages"].to_pylist() for split in (train, test)]
    if asked.kind == "clusters":
        whole = [["\n".join(each["content"] for each in messages) for messages in split] for split in said]
        found = likeness.clusters(asked.groups, whole[0], whole[1], seed)
    else:
        last = [[messages[-1]["content"] for messages in split] for split in said]
        found = likeness.lengths(asked.groups, last[0], last[1])
    place = train.column_names.index("label")
    labelled = (
        split.set_column(place, "label", pa.array(codes)) for split, codes in ((train, found.train), (test, found.test))
    )
    return (found.names, *labelled)  # type: ignore[return-value]


def _table(
    split: RawSplit, config: DataConfig, mapped: Mapping[str, str], picked: pa.Table
) -> tuple[pa.Table, list[str]]:
    """The picked rows as dialogues, and what is to be said of those that were left out."""
    import pyarrow as pa

    form, drop = forms.of(split, config, mapped), config.empty == "drop"
    extras = {"tests": forms.tests_of(split, config), "options": forms.lists_of(split, config.options, "data.options")}
    numbers, rows = picked["row"].to_numpy(), split.table.take(picked["row"]).to_pylist()
    found = [
        understood(form, row, f"{split.where}: row {number + 1}", drop)
        for number, row in zip(numbers.tolist(), rows, strict=True)
    ]
    kept = np.array([each is not None for each in found], dtype=bool)
    left = [row for row, keep in zip(rows, kept, strict=True) if keep]
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]))
    columns: dict[str, Any] = {"messages": pa.array([each for each in found if each is not None], kind)}
    columns["label"] = picked["label"].filter(pa.array(kept))
    owner = config.client or mapped.get("client", "")
    if config.client or owner in split.table.column_names:
        owners = groups.texts(split, owner, "data.client")
        columns["client"] = pa.array([owners[number] for number in numbers[kept]], pa.large_string())
    for name, lists in extras.items():
        if lists:
            columns[name] = pa.array([lists(row) for row in left], pa.list_(pa.large_string()))
    gone = len(rows) - len(left)
    note = f"{split.where}: {counted(gone, 'example')} with an empty response or prompt left out (data.empty=drop)"
    return pa.table(columns), [note] if gone else []
