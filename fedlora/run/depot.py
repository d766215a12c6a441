"""What workers on other machines are asked and given, and what comes back from them: the side of who orchestrates."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from fedlora.errors import WorkerError, listed
from fedlora.files import filesets
from fedlora.files.atomic import write_atomic
from fedlora.files.filesets import FileSet
from fedlora.model import provenance
from fedlora.model.known import KNOWN, resolve
from fedlora.run import together
from fedlora.run.participation import Ask
from fedlora.run.records import SETUP, Part, Setup
from fedlora.run.request import Answer, Held, Request
from fedlora.run.runfolder import RUN, RunFolder
from fedlora.run.traffic import due
from fedlora.seeds import Turn
from fedlora.strategies.base import ServerState


class Depot:
    """The files of a run, in an engine's store as far as workers have asked for them.

    Args:
        run: whose.
        state: of its server after a round.
        put: puts bytes into the engine's store. Where workers may see the files (`runner.shared_files`), nothing is put
            until one of them does not.
    """

    def __init__(self, run: RunFolder, state: Callable[[int], ServerState], put: Callable[[bytes], Held]) -> None:
        self._run, self._state, self._put = run, state, put
        self._asked = not run.config.runner.shared_files
        self._putting = threading.Lock()
        self._held: dict[str, Sequence[Held]] = {}
        self.put_bytes = 0
        """Put into the engine's store so far."""

    def training(self, ask: Ask) -> Request:
        """A request for the clients of an attempt."""
        request = self._request(ask.round, [self._run.state_stem(ask.round - 1)])
        state = self._state(ask.round - 1)
        turns = (Turn(state.seed, ask.round, client, ask.attempt) for client in ask.clients)
        broadcast = self._run.strategy.broadcast
        needed = tuple(due(self._run, turn, state.base, broadcast(state, turn.client)) for turn in turns)
        return replace(request, clients=ask.clients, needed=needed, attempt=ask.attempt)

    def scoring(self, number: int, parts: Sequence[Part]) -> Request:
        """A request for parts that are scored after a round."""
        stems: dict[str, None] = {}
        for part in parts:
            probe = part.split == "probe"
            before, after = self._run.state_stem(number - 1), self._run.state_stem(number)
            stems |= dict.fromkeys([before, part.stem] if probe else [after])
        return replace(self._request(number, list(stems)), parts=tuple(parts))

    def supply(self, request: Request, digests: Iterable[str]) -> Request:
        """The request again, with files that a worker could not get put into the store."""
        with self._putting:
            self._asked = True
            if any(digest in request.held for digest in digests):  # with a machine that has held others, too
                self._held = {d: held for d, held in self._held.items() if held is not request.held.get(d)}
            return self._with_held(request)

    def _with_held(self, request: Request) -> Request:
        """With all its files in the store; those of earlier rounds leave it."""
        needed = {file.digest: Path(each.folder) / file.name for each in request.sets for file in each.files}
        lasting = {file.digest for each in self._always if each for file in each.files}
        self._held = {digest: held for digest, held in self._held.items() if digest in lasting or digest in needed}
        for digest, path in needed.items():
            if digest not in self._held:
                self._held[digest] = tuple(self._pieces(path))
        return replace(request, held={digest: self._held[digest] for digest in needed})

    def _pieces(self, path: Path) -> Iterator[Held]:
        for content in filesets.chunks(path):
            self.put_bytes += len(content)
            yield self._put(content)

    def _request(self, number: int, stems: Sequence[str]) -> Request:
        runner = self._run.config.runner
        names = [f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".json")]
        states = filesets.described(self._run.path, names)
        with self._putting:
            configuration, rows, tokens, model = self._always
            request = Request(
                self._run.id,
                number,
                configuration,
                rows,
                states,
                tokens,
                model,
                engine=runner.kind,
                device=runner.device,
                gpu=runner.gpus_per_client > 0,
                shared=runner.shared_files,
            )
            return self._with_held(request) if self._asked else request

    @cached_property
    def _always(self) -> tuple[FileSet, FileSet, FileSet, FileSet | None]:
        """Configuration, rows, tokens and model: what is the same in every round."""
        path, tokens = self._run.path, Setup.read(self._run).tokens
        return (
            filesets.described(path, [name for name in (RUN, SETUP, together.FILE) if (path / name).is_file()]),
            filesets.described(path, ("partition.npz",)),
            filesets.described(tokens, sorted(file.name for file in tokens.iterdir())),
            self._model(),
        )

    def _model(self) -> FileSet | None:
        name = self._run.config.model.name
        folder = Path(resolve(name))
        if name in KNOWN or not folder.is_dir():
            return None
        known = provenance.parts_of(folder)
        return filesets.described(folder, sorted(known), known)

    def take(self, request: Request, answer: Answer) -> None:
        """Write what clients have sent into the run folder, as a worker on this machine does; it counts once it was
        inspected.

        Raises:
            WorkerError: it is not of clients that were asked.
        """
        if strange := [sent.client for sent in answer.sent if sent.client not in request.clients]:
            raise WorkerError(f"{answer.worker} sent updates of clients {listed(strange)}, who were not asked")
        for sent in answer.sent:
            stem = self._run.path / self._run.client_stem(request.round, sent.client)
            write_atomic(stem.with_suffix(".safetensors"), sent.tensors, durable=False)
            write_atomic(stem.with_suffix(".json"), sent.record, durable=False)
