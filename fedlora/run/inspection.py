"""What is asked of a client's update before it may reach the aggregate.

What the server knows better is not believed. Only the client can know how many of its examples it trained on, its
losses, scores, seconds and bytes: these are taken as it says, where they are such numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedlora.adapter import Adapter
from fedlora.channel import faults as channel
from fedlora.channel import uploads
from fedlora.config import RunConfig
from fedlora.errors import AdapterError, UpdateRejected
from fedlora.files.limits import clean
from fedlora.objective import Scores
from fedlora.run.records import ClientRecord
from fedlora.run.runfolder import RunFolder
from fedlora.seeds import Turn


@dataclass(frozen=True)
class Accepted:
    """An update that was inspected: what the client says of its training, and its adapter."""

    record: ClientRecord
    digest: str
    """Of the adapter's file."""
    adapter: Adapter


def inspect(run: RunFolder, turn: Turn, start: Adapter, most_examples: int, in_memory: bool = True) -> Accepted:
    """The update that a client sent, if it is one that was asked for. Its files are read once.

    Args:
        run: where the update is.
        turn: what the client was asked for.
        start: what it was sent; the update has its modules and shapes, in ranks at most as high.
        most_examples: that the client can have trained on.
        in_memory: keep the tensors; otherwise the adapter lives in its file.

    Raises:
        UpdateRejected: a stale round, a replayed ticket, a file that is not what was sent, a module, shape, rank or
            type that was not asked for, values that are not finite, a change beyond `channel.max_norm`, a record that
            does not say what it should.
    """
    stem = run.client_stem(turn.round, turn.client)
    record = run.read_json(f"{stem}.json")
    if not isinstance(record, Mapping):
        raise UpdateRejected(f"{turn}: no update arrived")
    _check_record(record, turn, most_examples)
    _check_tokens(run.config, record, turn)
    if run.digest_of(f"{stem}.safetensors") != record["digest"]:
        raise UpdateRejected(f"{turn}: the file does not have the digest it was sent with")
    try:
        upload = uploads.inspect(run.path / f"{stem}.safetensors", start, str(turn), in_memory=in_memory)
    except AdapterError as error:
        said = str(error)
        raise UpdateRejected(said if said.startswith(str(turn)) else f"{turn}: {said}") from None
    _check_norm(upload, start, run.config.channel.max_norm, turn)
    known = _read(record, turn, run.objective.scores)
    if known.rank != upload.rank:
        raise UpdateRejected(f"{turn}: the update says it has rank {known.rank}, and has {upload.rank}")
    return Accepted(known, record["digest"], upload)


def _read(record: Mapping[str, Any], turn: Turn, kind: type[Scores]) -> ClientRecord:
    try:
        return ClientRecord.from_json(record, kind)
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateRejected(f"{turn}: the update does not say what it should ({clean(repr(error))})") from None


def _check_record(record: Mapping[str, Any], turn: Turn, most_examples: int) -> None:
    if record.get("client") != turn.client:
        raise UpdateRejected(f"{turn}: the update says it is of client {record.get('client')!r:.40}")
    if record.get("round") != turn.round:
        raise UpdateRejected(f"{turn}: the update is of round {record.get('round')!r:.40}")
    if record.get("ticket") != channel.ticket(turn):
        raise UpdateRejected(f"{turn}: the update's ticket {record.get('ticket')!r:.40} is not the one of this round")
    examples = record.get("examples")
    if not isinstance(examples, int) or isinstance(examples, bool) or not 0 < examples <= most_examples:
        raise UpdateRejected(
            f"{turn}: says it trained on {examples!r:.40} examples; expected a number from 1 to {most_examples}"
        )
    if not isinstance(record.get("digest"), str):
        raise UpdateRejected(f"{turn}: the update has no digest")


def _check_tokens(config: RunConfig, record: Mapping[str, Any], turn: Turn) -> None:
    """Where they are its weight: no more than its examples can have."""
    most, tokens = record["examples"] * config.data.max_length, record.get("tokens")
    possible = isinstance(tokens, int) and not isinstance(tokens, bool) and 0 < tokens <= most
    if config.weighting == "tokens" and not possible:
        raise UpdateRejected(f"{turn}: says it trained on {tokens!r:.40} tokens; expected a number from 1 to {most}")


def change_norm(upload: Adapter, start: Adapter) -> float:
    """The L2 norm of all that a client changed, adapter and head together; in float64."""
    before, after = start.cut_like(upload).tensors(), upload.tensors()
    squares = [torch.sum((after[name].double() - before[name].double()) ** 2) for name in after]
    return math.sqrt(float(torch.stack(squares).sum()))


def _check_norm(upload: Adapter, start: Adapter, most: float | None, turn: Turn) -> None:
    if most is None:
        return
    norm = change_norm(upload, start)
    if not norm <= most:
        raise UpdateRejected(f"{turn}: the change has norm {norm:.4g}, above channel.max_norm={most:g}")
