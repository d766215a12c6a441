"""Names of flow runs."""

from __future__ import annotations

import re
from functools import cache
from typing import Any
from uuid import UUID

from coolname.data import config as word_lists
from prefect import runtime
from prefect.client.orchestration import get_client

_OF_THE_FORM = re.compile(
    "(Awesome|Rustic|Small|Gorgeous|Fantastic|Sleek|Intelligent|Unbranded|Refined|Licensed|Generic|Practical|Ergonomic|"
    r"Handcrafted|Tasty|Handmade|Incredible)-[A-Z].{1,5}"
)
"""What the second UI of Prefect 3.8.8 writes into the field for the name: one of these and a short animal."""


def replace_generated(name: str) -> None:
    """Name the flow run under way, unless a person named it: Prefect draws two words ("placid-walrus").

    The old name stays as a tag: `prefect deployment run` has printed it, and a person may ask for it.
    """
    drawn = str(runtime.flow_run.name)
    if runtime.flow_run.id and is_generated(drawn):
        run = UUID(str(runtime.flow_run.id))
        with get_client(sync_client=True) as client:
            tags = {*client.read_flow_run(run).tags, former(drawn)}
            client.update_flow_run(run, name=name, tags=sorted(tags))


def former(name: str) -> str:
    """The tag of a flow run that had this name before."""
    return f"created as {name}"


def is_generated(name: str) -> bool:
    """Whether a name is two words of the vocabulary that Prefect draws from: its server, or the form in its browser."""
    if _OF_THE_FORM.fullmatch(name):
        return True
    words = name.split("-")
    return len(words) == 2 and all(word in _vocabulary() for word in words)


@cache
def _vocabulary() -> frozenset[str]:
    lists: Any = word_lists
    return frozenset(str(word) for entry in lists.values() for word in entry.get("words", ()))
