"""The division of a data set among clients: drawn once, hashed, written to the run folder.

Training rows follow the partitioner; test rows follow the training rows, so that each client is tested on its own
distribution (evaluation protocol, `local`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedlora.config import PartitionConfig
from fedlora.data.partitioners import PARTITIONERS, REDRAWN, Deal, Rows
from fedlora.errors import DataError, counted, saving
from fedlora.seeds import numpy_generator

_DRAWS = 100


@dataclass(frozen=True, eq=False)
class Partition:
    """Which rows of the two splits are whose. `hash` names the division and the data: compare runs with equal ones."""

    name: str
    labels: tuple[str, ...]
    train: tuple[Rows, ...]
    """Per client, sorted row numbers of the training split (int64)."""
    test: tuple[Rows, ...]
    """Per client, sorted row numbers of the test split (int64); may be empty."""
    label_counts: Rows
    """Training examples, clients × labels."""
    hash: str
    data_digest: str
    owners: tuple[tuple[str, ...], ...] = ()
    """Per client, the owners (`data.client`) of its training rows, sorted; only where the partitioner goes by owner."""
    unheld: int = 0
    """Test rows of owners that have no training row: nobody holds them."""

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.train)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Training examples per client."""
        return tuple(len(rows) for rows in self.train)

    @property
    def test_sizes(self) -> tuple[int, ...]:
        """Test examples per client."""
        return tuple(len(rows) for rows in self.test)

    def summary(self) -> dict[str, Any]:
        """What is worth logging, as JSON values: all but the row numbers."""
        by_owner = {"owners": [list(names) for names in self.owners], "unheld_test_rows": self.unheld}
        return {
            "partitioner": self.name,
            "hash": self.hash,
            "clients": self.clients,
            "sizes": list(self.sizes),
            "test_sizes": list(self.test_sizes),
            "labels": list(self.labels),
            "label_counts": self.label_counts.tolist(),
            **(by_owner if self.owners else {}),
        }

    def notes(self) -> list[str]:
        """What somebody who named owners should know of how they were dealt, a line each."""
        owners = sum(map(len, self.owners))
        told = []
        if owners > self.clients:
            least, most = min(map(len, self.owners)), max(map(len, self.owners))
            each = f"{least}" if least == most else f"{least} to {most}"
            told.append(
                f"{owners} owners are merged into {counted(self.clients, 'client')}, {each} in each (partition.json "
                f"names them); clients={owners} would keep them apart"
            )
        if self.unheld:
            told.append(
                f"{counted(self.unheld, 'test row is', 'test rows are')} of owners without a training row; "
                "no client is tested on them"
            )
        return told

    def save(self, path: Path) -> None:
        """Write one `.npz` file (no pickles), complete or not at all.

        Raises:
            RunFolderError: the file cannot be written.
        """
        meta: dict[str, Any] = {
            "name": self.name,
            "labels": self.labels,
            "hash": self.hash,
            "data_digest": self.data_digest,
        }
        if self.owners:
            meta |= {"owners": self.owners, "unheld": self.unheld}
        arrays = {"label_counts": self.label_counts, "meta": np.array(json.dumps(meta))}
        for split, parts in (("train", self.train), ("test", self.test)):
            arrays[f"{split}_rows"], arrays[f"{split}_sizes"] = _flat(parts)
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
                os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Partition:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, damaged, or its content does not have the hash it claims.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(str(file["meta"]))
                train, test = (_parts(file[f"{s}_rows"], file[f"{s}_sizes"]) for s in ("train", "test"))
                labels = tuple(meta.pop("labels"))
                meta["owners"] = tuple(map(tuple, meta.get("owners", ())))
                loaded = cls(labels=labels, train=train, test=test, label_counts=file["label_counts"], **meta)
            if loaded.hash != _hash(train, test, loaded.data_digest):
                raise ValueError("its rows do not have the hash it claims")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"cannot read the partition {path}: {error}. Restore the file or start a new run"
            ) from error
        return loaded


class Split(NamedTuple):
    """A split that is to be dealt."""

    labels: npt.ArrayLike
    """Class index of every row."""
    owners: Sequence[str] | None = None
    """Owner of every row, for `natural-id`, where the data names owners."""


def partition(
    config: PartitionConfig,
    clients: int,
    seed: int,
    train: Split,
    test: Split,
    labels: Sequence[str],
    data_digest: str,
) -> Partition:
    """Deal every training row to exactly one client, and the test rows after them; equal arguments, equal division.

    Args:
        config: the partitioner and its settings.
        clients: how many clients there are.
        seed: of the run.
        train: the rows that are trained on.
        test: those that follow them.
        labels: names of the classes.
        data_digest: names the data; goes into the hash.

    Test rows of a label go to clients in proportion to their shares of its training rows. Under `natural-id` they go
    where their owner's training rows are, if they have owners. Test rows of labels and owners that nobody trains on go
    to nobody.

    Raises:
        DataError: the partitioner cannot give every client `min_size` examples, or not with these labels and owners.
    """
    ours = np.asarray(train.labels, dtype=np.int64)
    _require_enough(len(ours), clients, config)
    generator = numpy_generator(seed, "partition")
    owners = None if train.owners is None else list(train.owners)
    dealt = _draw(Deal(config, clients, ours, tuple(labels), owners, generator, frozenset(test.owners or ())))
    counts = np.stack([np.bincount(ours[rows], minlength=len(labels)) for rows in dealt]).astype(np.int64)
    held: tuple[tuple[str, ...], ...] = ()
    if config.name == "natural-id" and owners is not None:
        held = tuple(tuple(sorted({owners[row] for row in rows})) for rows in dealt)
    if held and test.owners is not None:
        tested = _by_owner(held, test.owners)
        unheld = len(test.owners) - sum(map(len, tested))
    else:
        tested, unheld = _by_share(counts, np.asarray(test.labels, dtype=np.int64), generator), 0
    digest = _hash(dealt, tested, data_digest)
    return Partition(config.name, tuple(labels), dealt, tested, counts, digest, data_digest, held, unheld)


def _require_enough(examples: int, clients: int, config: PartitionConfig) -> None:
    if examples < clients * config.min_size:
        raise DataError(
            f"{counted(examples, 'training example')} cannot give {counted(clients, 'client')} "
            f"partition.min_size={config.min_size} each "
            f"({clients * config.min_size} needed); lower clients or partition.min_size, or use a larger set (or a "
            "larger data.train_size, where that is what cuts it)"
        )


def _draw(deal: Deal) -> tuple[Rows, ...]:
    """Deal, again if chance alone left somebody below `min_size`."""
    draws = _DRAWS if deal.config.name in REDRAWN else 1
    reached = 0
    for _ in range(draws):
        dealt = tuple(np.sort(rows).astype(np.int64) for rows in PARTITIONERS[deal.config.name](deal))
        smallest = min(len(rows) for rows in dealt)
        if smallest >= deal.config.min_size:
            return dealt
        reached = max(reached, smallest)
    raise DataError(_too_small(deal, reached, draws))


def _too_small(deal: Deal, reached: int, draws: int) -> str:
    name = deal.config.name
    cure = "raise partition.alpha, lower partition.min_size, or lower clients"
    if name not in REDRAWN:
        cure = "lower partition.min_size or clients"
    often = f" in the best of {draws} draws" if draws > 1 else ""
    alpha = f" with partition.alpha={deal.config.alpha:g}" if name in REDRAWN else ""
    return (
        f"partition.name={name}{alpha} leaves a client with {counted(reached, 'training example')}{often}, below "
        f"partition.min_size={deal.config.min_size}; {cure}"
    )


def _by_share(counts: Rows, test_labels: Rows, generator: np.random.Generator) -> tuple[Rows, ...]:
    """Deal each label's test rows by its training counts (clients × labels).

    What rounding took from a client with one label it gets first with the next: otherwise many small clients would
    all be short in the same direction.
    """
    clients = len(counts)
    parts: list[list[Rows]] = [[np.zeros(0, dtype=np.int64)] for _ in range(clients)]
    owed = generator.random(clients) * 1e-6  # equal claims are met in random order
    for label in np.flatnonzero(counts.sum(axis=0)):
        rows = generator.permutation(np.flatnonzero(test_labels == label))
        quotas = len(rows) * counts[:, label] / counts[:, label].sum()
        given = np.floor(quotas).astype(np.int64)
        claims = np.where(quotas > given, quotas - given + owed, -np.inf)
        given[np.argsort(-claims, kind="stable")[: len(rows) - int(given.sum())]] += 1
        owed += quotas - given
        for part, mine in zip(parts, np.split(rows, np.cumsum(given)[:-1]), strict=True):
            part.append(mine)
    return tuple(np.sort(np.concatenate(part)) for part in parts)


def _by_owner(held: tuple[tuple[str, ...], ...], test_owners: Sequence[str]) -> tuple[Rows, ...]:
    client_of = {owner: client for client, owners in enumerate(held) for owner in owners}
    clients = np.array([client_of.get(owner, -1) for owner in test_owners], dtype=np.int64)
    return tuple(np.flatnonzero(clients == client) for client in range(len(held)))


def _hash(train: tuple[Rows, ...], test: tuple[Rows, ...], data_digest: str) -> str:
    digest = hashlib.sha256(data_digest.encode())
    for parts in (train, test):
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def _flat(parts: tuple[Rows, ...]) -> tuple[Rows, Rows]:
    return np.concatenate(parts), np.array([len(part) for part in parts], dtype=np.int64)


def _parts(rows: Rows, sizes: Rows) -> tuple[Rows, ...]:
    if sizes.sum() != len(rows):
        raise ValueError("sizes and rows do not agree")
    return tuple(np.split(rows, np.cumsum(sizes)[:-1]))
