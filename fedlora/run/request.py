"""What a worker on another machine is asked, and what it answers: all that passes between it and whoever orchestrates.

A request names what the work is made from by digests, and holds nothing of it. An answer holds the clients' files as
they are stored, as bytes; what they say is looked at where they arrive (`fedlora.run.inspection`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedlora.files.filesets import FileSet
from fedlora.objective import Scores
from fedlora.run.records import Part
from fedlora.run.traffic import Due


class Held(Protocol):
    """Bytes in the store of an engine that connects the machines; travels with a request without them."""

    def get(self) -> bytes:
        """The bytes, to be called in a worker.

        Raises:
            LookupError: they are not in the store any more.
        """


@dataclass(frozen=True)
class Request:
    """A piece of a run's work: clients of a round to be trained, or parts to be scored after it."""

    run: str
    """Id of the run."""
    round: int
    configuration: FileSet
    """Settings, and what is known of the data."""
    rows: FileSet
    """The partition."""
    states: FileSet
    """Of the server, those that the work begins from; and adapters that are scored besides."""
    tokens: FileSet
    model: FileSet | None
    """The base model, where it is a folder of whoever orchestrates; others are found by their name."""
    clients: tuple[int, ...] = ()
    """To be trained, one after the other."""
    needed: tuple[Due, ...] = ()
    """What each of them must receive, as the rounds before say."""
    attempt: int = 0
    """With run, round and client it gives the tickets (`fedlora.channel.faults.ticket`)."""
    parts: tuple[Part, ...] = ()
    """To be scored, one after the other."""
    engine: str = "ray"
    """That carries it (`runner.kind`)."""
    device: str = "auto"
    """`runner.device`."""
    gpu: bool = False
    """Whether the engine gives it a GPU, or a share of one."""
    quiet: tuple[str, ...] = ()
    """Loggers of whatever carries it that would say of each piece of work that it has ended well."""
    shared: bool = True
    """Whether files may be read where whoever orchestrates has them, if the worker sees the same there."""
    held: Mapping[str, Sequence[Held]] = field(default_factory=dict)
    """Files in the engine's store, by their digest, in pieces."""

    def __dask_tokenize__(self) -> tuple[object, ...]:
        """What tells it from others: Dask would pickle and hash all that it holds."""
        return (self.run, self.round, self.clients, self.attempt, [str(part) for part in self.parts])

    @property
    def sets(self) -> list[FileSet]:
        """All that it is made from."""
        found = [self.configuration, self.rows, self.states, self.tokens]
        return [*found, self.model] if self.model else found


@dataclass(frozen=True)
class Sent:
    """A client's two files, as they are stored (`RunFolder.client_stem`)."""

    client: int
    tensors: bytes
    """safetensors."""
    record: bytes
    """JSON."""


@dataclass(frozen=True)
class Answer:
    """What came of a request."""

    worker: str
    """Machine and process."""
    absent: tuple[str, ...] = ()
    """Digests of files that it could not get; if there are any, nothing was done."""
    sent: tuple[Sent, ...] = ()
    why: tuple[str | None, ...] = ()
    """Of each client, why it could not train."""
    scores: tuple[Scores, ...] = ()
    """Of each part."""
    each_s: float | None = None
    """Seconds of a client or part; None where nothing was left to do."""
    said: tuple[str, ...] = ()
    """What is worth a line."""
    fetched: int = 0
    """Bytes out of the engine's store."""
    memory: int = 0
    """Resident bytes of the process."""
