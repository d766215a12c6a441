"""A run folder as a worker on another machine has it: what a request names, found, fetched or linked. The jobs that it
does are those of every other worker."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil

from fedlora.errors import RunFolderError
from fedlora.files import home
from fedlora.files.filesets import Cache, File, FileSet
from fedlora.run import groups, jobs, stores
from fedlora.run.participation import Ask
from fedlora.run.records import SETUP, Setup
from fedlora.run.request import Answer, Request, Sent
from fedlora.run.runfolder import RUN, RunFolder
from fedlora.training.workers import ThreadSlot, Workbench

MOST_BYTES = 2**35
"""Of what a worker's machine has fetched: 32 GiB, which a base model of 7B in bf16 and the states of a run fit into."""
_ANSWERS_WITHIN_S = 5.0
_SIGN = "~"
"""Between the parts of a folder's name; no name of a machine has it."""
_working = threading.Lock()
"""A process does one piece of work at a time: torch has one random stream for a device, whatever threads there are."""


def name() -> str:
    """This machine and process."""
    return f"{socket.gethostname()}:{os.getpid()}"


def warm_up() -> None:
    """Import what the work needs, while whoever orchestrates still prepares it."""
    jobs.warm_up(Workbench("cpu"))


def reaches(host: str, port: int) -> bool:
    """Whether something answers at an address, from here."""
    try:
        socket.create_connection((host, port), _ANSWERS_WITHIN_S).close()
    except OSError:
        return False
    return True


def train(request: Request) -> Answer:
    """Train the clients of a request, one after the other.

    Raises:
        FedloraError: what concerns not one client alone.
    """
    return _answered(request, _trained)


def evaluate(request: Request) -> Answer:
    """Score the parts of a request, one after the other."""
    return _answered(request, _scored)


def _answered(request: Request, work: Callable[[ThreadSlot, RunFolder, Request, groups.Say], Answer]) -> Answer:
    for name_of in request.quiet:
        logging.getLogger(name_of).addFilter(_told_of_ends)
    with _working:
        fetching = _Fetching(request)
        try:
            run = _mirrored(request, fetching)
        except _AbsentError as absent:
            return Answer(name(), absent=tuple(absent.digests))
        said: list[str] = []
        done = work(_slot(_device(request), run.config.runner.threads), run, request, said.append)
        memory = psutil.Process().memory_info().rss
        return replace(done, said=tuple(said), fetched=fetching.bytes, memory=memory)


def _told_of_ends(record: logging.LogRecord) -> bool:
    """Whether a line is worth reading beside the rounds: that one of thousands of pieces has ended well is not."""
    return not str(record.msg).startswith("Finished in state Completed")


def _trained(slot: ThreadSlot, run: RunFolder, request: Request, say: groups.Say) -> Answer:
    ask = Ask(request.round, request.attempt, request.clients)
    worked = groups.train(slot, run, ask, _nobody, say, dict(zip(request.clients, request.needed, strict=True)))
    sent = tuple(found for client in request.clients if (found := _sent(run, request.round, client)))
    return Answer(name(), sent=sent, why=tuple(worked.results), each_s=worked.each_s)


def _scored(slot: ThreadSlot, run: RunFolder, request: Request, say: groups.Say) -> Answer:
    worked = groups.evaluate(slot, run, request.round, request.parts, _nobody, say)
    return Answer(name(), scores=tuple(worked.results), each_s=worked.each_s)


def _nobody() -> None:
    """Nobody hears of each piece: the answer tells of all."""


def _sent(run: RunFolder, number: int, client: int) -> Sent | None:
    """What a client has sent, which stays here no longer; None where it sends nothing."""
    stem = run.path / run.client_stem(number, client)
    tensors, record = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
    with suppress(FileNotFoundError):
        found = Sent(client, tensors.read_bytes(), record.read_bytes())
        record.unlink()
        tensors.unlink()
        return found
    return None


@cache
def _slot(device: str, threads: int) -> ThreadSlot:
    """This process's place for work on a device; the base model stays in it."""
    return ThreadSlot(device, threads)


def _device(request: Request) -> str:
    """The device of this process: its share of the machine's GPUs, where it was given one."""
    if request.device == "mps" or not request.gpu:
        return "cpu" if request.device == "auto" else request.device
    return f"cuda:{stores.gpu(request.engine) or 0}"


class _AbsentError(Exception):
    """Files are neither here nor in the store."""

    def __init__(self, digests: Iterable[str]) -> None:
        super().__init__()
        self.digests = list(digests)


class _Fetching:
    """Gets files out of the engine's store, and counts."""

    def __init__(self, request: Request) -> None:
        self._request, self.bytes = request, 0

    def missing(self, wanted: FileSet) -> list[str]:
        return [file.digest for file in wanted.files if file.digest not in self._request.held]

    def get(self, file: File) -> Iterable[bytes]:
        for held in self._request.held[file.digest]:
            try:
                content = held.get()
            except LookupError:
                raise _AbsentError([file.digest]) from None
            self.bytes += len(content)
            yield content


def _mirrored(request: Request, fetching: _Fetching) -> RunFolder:
    """The folder of the run with all that the request names."""
    cached = Cache(_root() / "sets", MOST_BYTES)
    places: dict[str, Path] = {}
    absent: list[str] = []
    for wanted in request.sets:
        if request.shared and wanted.seen():
            places[wanted.digest] = Path(wanted.folder)
        elif not cached.has(wanted) and (missing := fetching.missing(wanted)):
            absent += missing
        else:
            places[wanted.digest] = cached.have(wanted, fetching.get)
    if absent:
        raise _AbsentError(absent)
    run = _folder(request.run)
    for wanted in (request.rows, request.states):
        for file in wanted.files:
            _link(run.path / file.name, places[wanted.digest] / file.name)
    model = places[request.model.digest] if request.model else None
    _describe(run, places[request.configuration.digest], places[request.tokens.digest], model, request.configuration)
    _forget_others(run, request.states)
    return run


def _describe(run: RunFolder, known: Path, tokens: Path, model: Path | None, configuration: FileSet) -> None:
    """Settings and setup, with the places that files have here; written where they are others than before."""
    mark = run.path / "mirrored.txt"
    here = f"{configuration.digest} {tokens} {model}"
    with suppress(OSError):
        if mark.read_text("utf-8") == here:
            return
    theirs = RunFolder(known)
    content = theirs.need_json(RUN)
    if model:
        content["config"]["model"]["name"] = str(model)
    run.write_json(RUN, content, durable=False)
    replace(Setup.read(theirs), tokens=tokens).write(run)
    for file in configuration.files:
        if file.name not in (RUN, SETUP):
            _link(run.path / file.name, known / file.name)
    mark.write_text(here, "utf-8")


def _link(place: Path, target: Path) -> None:
    """A link, unless it is there as it should be."""
    with suppress(OSError):
        if place.readlink() == target:
            return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(target)


def _forget_others(run: RunFolder, states: FileSet) -> None:
    """Remove links to states that are not needed any more: what they lead to goes when there is no room."""
    needed = {file.name for file in states.files}
    for path in (run.path / "rounds").glob("*/*"):
        if path.is_symlink() and path.relative_to(run.path).as_posix() not in needed:
            path.unlink(missing_ok=True)


def _root() -> Path:
    return home.cache() / "far"


def _folder(run: str) -> RunFolder:
    """This process's own folder for a run; those of processes that have ended, and its own for other runs, go."""
    mirrors = _root() / "runs"
    own = mirrors / _SIGN.join((socket.gethostname(), str(os.getpid()), run))
    if not own.is_dir():
        try:
            own.mkdir(parents=True)
        except OSError as error:
            raise RunFolderError(
                f"the worker {name()} cannot write {own}: {error.strerror}; set FEDLORA_HOME there to a folder that "
                "can be written"
            ) from None
        for other in set(mirrors.glob(f"{socket.gethostname()}{_SIGN}*")) - {own}:
            process = int(other.name.split(_SIGN)[1])
            if process == os.getpid() or not psutil.pid_exists(process):
                shutil.rmtree(other, ignore_errors=True)
    return RunFolder(own)
