"""A picture of a partition: who has how much of what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.data.partition import Partition
from fedlora.errors import counted, saving

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES: dict[str, Any] = {"parse_math": False}
"""Labels and owners are shown as they are: two dollars would make a formula of what is between them."""
_READABLE = 40
"""Rows or columns that can all carry a name; of more, only some do."""
_BARS = 200
"""Clients that have a bar of their own."""


def draw_once(run: Path) -> None:
    """Draw the partition of the run in this folder, unless its picture is there.

    Raises:
        RunFolderError: the file cannot be written.
    """
    path = run / "figures" / "partition.png"
    if not path.is_file():
        draw(Partition.load(run / "partition.npz"), path)


def draw(partition: Partition, path: Path) -> None:
    """Write a PNG: training examples of each client (row) and label (column) as colour (white: none), sizes as bars.

    Raises:
        RunFolderError: the file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clients, labels = partition.label_counts.shape
    figure = Figure(figsize=(4.5 + min(12, max(2.5, 0.3 * labels)), 2 + min(14, max(2.5, 0.25 * clients))), dpi=110)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=[max(2.5, min(12, 0.3 * labels)), 1.5])
    # None at all is white: on the colour scale it could not be told from a few.
    image = heat.imshow(
        np.ma.masked_equal(partition.label_counts, 0),
        aspect="auto",
        cmap=colormaps["viridis"].with_extremes(bad="white"),
        interpolation="nearest",
        vmin=0,
    )
    figure.colorbar(image, ax=bars, label="training examples", pad=0.1)
    _name_axes(heat, partition)
    _draw_sizes(bars, partition)
    figure.suptitle(
        f"{partition.name}, {counted(clients, 'client')}, {counted(labels, 'label')} (partition {partition.hash})",
        fontsize=11,
    )
    with saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})


def _name_axes(heat: Axes, partition: Partition) -> None:
    clients, labels = partition.label_counts.shape
    heat.set_xlabel("label")
    rows = _some(clients)
    if partition.owners:
        heat.set_ylabel("client: its owner, or their number")
        heat.set_yticks(rows, [_who(int(client), partition.owners[client]) for client in rows], **_NAMES, fontsize=9)
    else:
        heat.set_ylabel("client")
        heat.set_yticks(rows)
    columns = np.arange(labels) if labels <= 2 * _READABLE else _some(labels)
    names = [_cut(partition.labels[i]) for i in columns]
    heat.set_xticks(
        columns, names, **_NAMES, rotation=90 if labels > 3 else 0, fontsize=9 if labels <= _READABLE else 6
    )


def _who(client: int, owners: tuple[str, ...]) -> str:
    return f"{client}: {_cut(owners[0]) if len(owners) == 1 else f'{len(owners)} owners'}"


def _cut(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _draw_sizes(bars: Axes, partition: Partition) -> None:
    if partition.clients <= _BARS:
        bars.barh(np.arange(partition.clients), partition.sizes, height=0.8, color="0.45")
    else:  # as one outline: a bar each, too thin to be seen, would take seconds
        edges = np.arange(partition.clients + 1) - 0.5
        bars.stairs(partition.sizes, edges, orientation="horizontal", fill=True, color="0.45")
    bars.set_xlabel("examples\nof the client")
    bars.tick_params(axis="y", left=False, labelleft=False)
    bars.tick_params(axis="x", rotation=90)
    for side in ("top", "right"):
        bars.spines[side].set_visible(False)


def _some(count: int) -> Any:
    """At most about `_READABLE` evenly spaced positions."""
    step = 1 if count <= _READABLE else 5 if count <= 5 * _READABLE else -(-count // _READABLE)
    return np.arange(0, count, step)
