"""What a run costs: each cost with its words, once for tables, figures and sentences."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """A cost of a run; the mean over its seeds is shown."""

    title: str
    """Of a column."""
    axis: str
    """What it is, with its unit."""
    figure: str
    """Title of the score against it."""
    digits: int
    """Decimals in a table."""
    said: str = ""
    """In a sentence that begins with "It costs"; empty: it is not said there."""
    usual: bool = True
    """Whether its column is shown before anybody asks."""


COSTS = {
    "megabytes": Cost("MB", "sent both ways in the whole run (MB)", "megabytes", 2, "{:.1f} MB sent"),
    "server_seconds": Cost(
        "server s", "reading and aggregating (s)", "the server's seconds", 2, "{:.2g} s of the server"
    ),
    "seconds": Cost("seconds", "wall time in rounds of training (s)", "seconds", 1),
    "client_memory": Cost(
        "client memory",
        "peak memory of a client (MB)",
        "a client's memory",
        0,
        "{:.0f} MB of memory at a client",
        False,
    ),
    "server_memory": Cost("server memory", "peak memory of the server (MB)", "the server's memory", 0, usual=False),
}
"""By the name that it has in CSV and JSON. Memory is the peak over a run's rounds, in 10⁶ bytes."""
HIDDEN = tuple(cost.title for cost in COSTS.values() if not cost.usual)
"""Titles of the columns that are hidden until asked for."""
