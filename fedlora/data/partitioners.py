"""How training examples are dealt to clients: one small function a partitioner, found by its name in `PARTITIONERS`.

Each returns one array of row numbers per client; together they hold every row exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlora.config import PartitionConfig
from fedlora.data.apportion import largest_remainder
from fedlora.errors import DataError, counted

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Deal:
    """What a partitioner may look at."""

    config: PartitionConfig
    clients: int
    labels: Rows
    """Class index of every training row."""
    names: tuple[str, ...]
    owners: list[str] | None
    generator: np.random.Generator
    test_owners: frozenset[str] = frozenset()
    """Owners of test rows, to count those that have no others."""

    def by_label(self) -> dict[int, Rows]:
        """Label → its rows in random order; labels without rows are left out."""
        present = np.unique(self.labels)
        return {int(label): self.generator.permutation(np.flatnonzero(self.labels == label)) for label in present}


Partitioner = Callable[[Deal], list[Rows]]
PARTITIONERS: dict[str, Partitioner] = {}

REDRAWN = frozenset({"dirichlet", "mixed-quality"})
"""Partitioners whose sizes are random: another draw may keep `min_size` where the first did not."""


def partitioner(name: str) -> Callable[[Partitioner], Partitioner]:
    """Register a partitioner under the name that `partition.name` knows it by."""

    def register(function: Partitioner) -> Partitioner:
        PARTITIONERS[name] = function
        return function

    return register


@partitioner("iid")
def iid(deal: Deal) -> list[Rows]:
    """The same number of examples for everyone, drawn from all."""
    return np.array_split(deal.generator.permutation(len(deal.labels)), deal.clients)


@partitioner("dirichlet")
def dirichlet(deal: Deal) -> list[Rows]:
    """Each label is divided in proportions drawn from Dir(alpha). arXiv 1909.06335, in the form of 2102.02079."""
    return _dirichlet(deal, deal.by_label().values(), deal.clients)


@partitioner("shard")
def shard(deal: Deal) -> list[Rows]:
    """Rows in order of label, cut into equal shards; a client gets `labels_per_client` of them. arXiv 1602.05629."""
    each = deal.config.labels_per_client
    shards = np.array_split(np.concatenate(list(deal.by_label().values())), deal.clients * each)
    order = deal.generator.permutation(len(shards)).reshape(deal.clients, each)
    return [np.concatenate([shards[i] for i in mine]) for mine in order]


@partitioner("pathological")
def pathological(deal: Deal) -> list[Rows]:
    """Exactly `labels_per_client` labels for each client; the holders of a label share it equally."""
    rows, each = deal.by_label(), deal.config.labels_per_client
    if not len(rows) / deal.clients <= each <= len(rows):
        cure = "lower it" if each > len(rows) else "raise it or clients, or examples would be left over"
        raise DataError(
            f"partition.labels_per_client={each} for {counted(deal.clients, 'client')} and "
            f"{counted(len(rows), 'label')}: expected from {math.ceil(len(rows) / deal.clients)} to {len(rows)}; {cure}"
        )
    holders = _spread(sorted(rows), each, deal)
    for label, clients in holders.items():
        if len(rows[label]) < len(clients):
            raise DataError(
                f"label {deal.names[label]!r} has {counted(len(rows[label]), 'example')} for "
                f"{counted(len(clients), 'client')}; lower clients or partition.labels_per_client"
            )
    return _share(rows, holders, deal.clients)


@partitioner("one-label")
def one_label(deal: Deal) -> list[Rows]:
    """One label for each client; frequent labels have more clients, so that sizes stay as near as they can."""
    rows = deal.by_label()
    if deal.clients < len(rows):
        raise DataError(
            f"partition.name=one-label with {counted(deal.clients, 'client')} and "
            f"{counted(len(rows), 'label')} would leave examples over; set clients to at least {len(rows)}"
        )
    counts = dict.fromkeys(rows, 1)
    for _ in range(deal.clients - len(rows)):
        counts[max(rows, key=lambda label: len(rows[label]) / counts[label])] += 1
    clients = iter(deal.generator.permutation(deal.clients).tolist())
    return _share(rows, {label: [next(clients) for _ in range(count)] for label, count in counts.items()}, deal.clients)


@partitioner("quantity")
def quantity(deal: Deal) -> list[Rows]:
    """Sizes from Dir(alpha), labels as they fall. Everyone gets `min_size` first; the draw divides what remains."""
    spare = len(deal.labels) - deal.clients * deal.config.min_size
    sizes = deal.config.min_size + largest_remainder(spare, _proportions(deal, deal.clients))
    return np.split(deal.generator.permutation(len(deal.labels)), np.cumsum(sizes)[:-1])


@partitioner("natural-id")
def natural_id(deal: Deal) -> list[Rows]:
    """By owner. More owners than clients: the largest owner goes to the client that has least, and so on."""
    if deal.owners is None:
        raise DataError("partition.name=natural-id needs data.client, the column that names each example's owner")
    owners, owner_of, sizes = np.unique(np.asarray(deal.owners), return_inverse=True, return_counts=True)
    if len(owners) < deal.clients:
        elsewhere = len(deal.test_owners.difference(owners.tolist()))
        more = f" ({elsewhere} more have test rows only)" if elsewhere else ""
        raise DataError(
            f"partition.name=natural-id: the training data has {counted(len(owners), 'owner')}{more} for "
            f"{counted(deal.clients, 'client')}; "
            f"set clients to at most {len(owners)}"
        )
    client_of, filled = np.arange(len(owners)), np.zeros(deal.clients, dtype=np.int64)
    if len(owners) > deal.clients:
        for owner in np.argsort(-sizes, kind="stable"):
            client_of[owner] = np.argmin(filled)
            filled[client_of[owner]] += sizes[owner]
    return [np.flatnonzero(client_of[owner_of] == client) for client in range(deal.clients)]


@partitioner("mixed-quality")
def mixed_quality(deal: Deal) -> list[Rows]:
    """A few clients (`balanced_fraction`) mirror the whole set; the rest is shared by Dir(alpha). 2406.17477."""
    balanced = math.ceil(round(deal.config.balanced_fraction * deal.clients, 6))
    in_order = np.concatenate(list(deal.by_label().values()))
    stripes = [in_order[client :: deal.clients] for client in range(deal.clients)]
    rest = np.concatenate([*stripes[balanced:], in_order[:0]])
    by_label = [rest[deal.labels[rest] == label] for label in np.unique(deal.labels[rest])]
    dealt = stripes[:balanced] + _dirichlet(deal, by_label, deal.clients - balanced)
    return [dealt[i] for i in deal.generator.permutation(deal.clients)]


def _dirichlet(deal: Deal, by_label: Iterable[Rows], clients: int) -> list[Rows]:
    parts: list[list[Rows]] = [[] for _ in range(clients)]
    for rows in by_label:
        cuts = np.cumsum(largest_remainder(len(rows), _proportions(deal, clients)))[:-1]
        for part, mine in zip(parts, np.split(rows, cuts), strict=True):
            part.append(mine)
    return [np.concatenate([np.zeros(0, dtype=np.int64), *part]) for part in parts]


def _proportions(deal: Deal, clients: int) -> npt.NDArray[np.float64]:
    drawn: npt.NDArray[np.float64] = deal.generator.dirichlet(np.full(clients, deal.config.alpha))
    if np.isfinite(drawn).all() and drawn.sum() > 0:
        return drawn
    # All draws underflow for a tiny alpha, whose limit is: everything to one.
    everything: npt.NDArray[np.float64] = np.eye(clients)[deal.generator.integers(clients)]
    return everything


def _spread(labels: list[int], each: int, deal: Deal) -> dict[int, list[int]]:
    """Label → its clients: every client takes the labels that have fewest clients so far, at random among equals."""
    holders: dict[int, list[int]] = {label: [] for label in labels}
    for client in deal.generator.permutation(deal.clients).tolist():
        shuffled = [labels[i] for i in deal.generator.permutation(len(labels))]
        for label in sorted(shuffled, key=lambda label: len(holders[label]))[:each]:
            holders[label].append(client)
    return holders


def _share(rows: dict[int, Rows], holders: dict[int, list[int]], clients: int) -> list[Rows]:
    parts: list[list[Rows]] = [[] for _ in range(clients)]
    for label, mine in holders.items():
        for client, part in zip(mine, np.array_split(rows[label], len(mine)), strict=True):
            parts[client].append(part)
    return [np.concatenate(part) for part in parts]
