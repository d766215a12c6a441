"""Scores before training, kept for runs that begin alike: the strategies of a sweep differ only in what comes after.

They are kept in `home.cache()/before`, under a digest of all that they depend on: the model with what was added to its
base, the adapter as it is sent, rows and tokens, how it is scored, and the code that does it. Where a plug-in judges,
nothing is kept: its code may change without anybody saying so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

import fedlora
from fedlora.errors import RunFolderError
from fedlora.files import home, limits
from fedlora.files.atomic import write_json
from fedlora.files.tensorfile import serialise
from fedlora.objective import Scores, scorers
from fedlora.run.records import Part, Setup
from fedlora.run.server import Server
from fedlora.strategies import state as states
from fedlora.strategies.base import ServerState

_LIBRARIES = ("torch", "transformers", "peft")
_BEGINNING = ("global/", "base/")
"""Tensors of a state before training that a model is made of; the others are what a strategy remembers."""
_LATER = {
    "name", "strategy", "strategy_options", "rounds", "clients", "fraction", "weighting", "keep_rounds", "partition",
    "training", "channel", "tracking",
}  # fmt: skip
"""Settings that say who trains on what, and how; the rows that are scored are in the partition's hash."""
_MOST = 2000
"""Parts of a run whose scores are kept; with more clients, they would be megabytes for each beginning."""


def known(server: Server, parts: Sequence[Part]) -> list[Scores] | None:
    """What each part came to when a run that began alike was scored; None where none was, or it is not whole."""
    kind = server.run.objective.scores
    if not _judged_by_us(server):
        return None
    try:
        found = [kind.from_json(scores) for scores in limits.read_json(_place(server, parts))]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if len(found) == len(parts) else None


def keep(server: Server, parts: Sequence[Part], scores: Sequence[Scores]) -> None:
    """Keep them for others, unless they are very many. A home that cannot be written is told of where something must
    be."""
    if len(parts) > _MOST or not _judged_by_us(server):
        return
    with suppress(RunFolderError):
        write_json(_place(server, parts), [each.to_json() for each in scores], durable=False)


def _judged_by_us(server: Server) -> bool:
    asked = map(scorers.find, server.run.config.evaluation.generate.scorers)
    return all(type(each).__module__.split(".")[0] == fedlora.__name__ for each in (server.run.objective, *asked))


@cache
def _changed() -> int:
    """When our own code was changed, in nanoseconds since 1970: who works on it must not meet scores of before."""
    return max((path.stat().st_mtime_ns for path in Path(fedlora.__file__).parent.rglob("*.py")), default=0)


def _place(server: Server, parts: Sequence[Part]) -> Path:
    run, state = server.run, server.state(0)
    setup, config = Setup.read(run), run.config
    sent = {name: tensor for name, tensor in states.tensors(state).items() if name.startswith(_BEGINNING)}
    content = [
        [fedlora.__version__, _changed(), *(version(name) for name in _LIBRARIES)],
        config.model_dump(mode="json", exclude=_LATER | {"runner"}),
        [config.runner.device, config.runner.threads],
        [str(setup.model), setup.tokens.name, list(setup.labels), run.need_json("partition.json")["hash"]],
        hashlib.sha256(serialise(sent)).hexdigest(),
        [str(part) for part in parts],
        None if _common(server, state, parts) else [config.strategy, config.strategy_options, states.scalars(state)],
    ]
    return home.cache() / "before" / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]}.json"


def _common(server: Server, state: ServerState, parts: Sequence[Part]) -> bool:
    """Whether all are sent what the state holds."""
    held = state.adapter.tensors()
    for part in parts:
        if part.client is not None:
            sent = server.run.strategy.broadcast(state, part.client).tensors()
            if sent.keys() != held.keys() or not all(sent[n] is held[n] or torch.equal(sent[n], held[n]) for n in held):
                return False
    return True
