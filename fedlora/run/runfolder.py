"""A run's state on disk: written atomically, checked by digest, so that whatever is there is whole.

run.json  config.yaml  setup.json  partition.npz  adapter_config.json  cohort.json  lock
rounds/000/  state.{safetensors,json}  record.json            before training
rounds/003/  client-007.{safetensors,json}  roll.json  state.{safetensors,json}  record.json
adapter/     the final adapter            figures/  tables/

`roll.json` says who was asked and what became of each, `record.json` closes a round: all that is needed of it later.
What lies beside it is removed as the run goes on (`keep_rounds`). JSON carries a seal, the digest of its own content.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlora import __version__, objective
from fedlora.config import RunConfig, configfile
from fedlora.errors import AdapterError, ConfigError, RunFolderError
from fedlora.files import limits, lock, remote
from fedlora.files.atomic import check_writable, write_atomic, write_json
from fedlora.files.tensorfile import read_tensors, serialise
from fedlora.objective import Objective, Score
from fedlora.strategies import registry
from fedlora.strategies import state as states
from fedlora.strategies.base import ServerState, Strategy

FORMAT = 3
"""Version of this layout, written to `run.json`."""

RUN = "run.json"
"""Id, layout, versions and configuration of a run."""

_NO_RUN = (lock.FILE, *remote.OF_A_COPY)
"""Files that a folder may hold before a run begins in it."""
_CONFIG, _SEAL = "config.yaml", "seal"
_LARGEST_JSON = 2**28
"""Bytes; the longest record of a client, with the loss of every step, has far fewer."""
_DECIDING = ("torch", "transformers", "peft", "numpy")
"""Packages whose versions may change the bits of a result."""


class RunFolder:
    """Typed access to one run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunFolder:
        """A folder for `config`; an existing one is continued if it was made with the same configuration.

        Raises:
            RunFolderError: not writable, holds something else, was made by another version of this layout, or with
                another configuration: says what differs.
        """
        folder = cls.check(path, config)
        folder._describe(config)
        return folder

    @classmethod
    def check(cls, path: Path, config: RunConfig) -> RunFolder:
        """Where `create` would make or continue a folder for `config`; nothing is made or changed.

        Raises:
            RunFolderError: as `create`.
        """
        folder = cls(path.expanduser().absolute())
        if folder.holds_run():
            folder._check_same(config)
        elif folder.path.is_dir() and any(each.name not in _NO_RUN for each in folder.path.iterdir()):
            raise RunFolderError(f"{folder.path} is not empty and holds no run; choose another --run-dir")
        check_writable(folder.path)
        return folder

    @classmethod
    def describe(cls, path: Path, config: RunConfig, extends: RunFolder) -> RunFolder:
        """Make a folder that holds what a run has done so far into the folder of a run of its own, which goes on.

        Args:
            path: of the folder.
            config: of the run that goes on.
            extends: the run that was copied.
        """
        known = extends.need_json(RUN)
        own = {"id": uuid.uuid4().hex, "config": config.model_dump(mode="json"), "extends": extends.id}
        folder = cls(path.expanduser().absolute())
        folder.write_json(RUN, {**known, **own})
        folder._describe(config)
        return folder

    @property
    def place(self) -> str:
        """Where it is kept: its path, or the URL that the folder is a copy of."""
        return remote.url_of(self.path) or str(self.path)

    @property
    def extends(self) -> str | None:
        """The id of the run that this one goes on from; None for one that began at the beginning."""
        return (self._known or {}).get("extends")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of a run that was begun; a damaged `config.yaml` or `run.json` is mended from the other.

        Raises:
            RunFolderError: it holds no run, one of another version of this layout, or one whose `config.yaml` was
                changed.
        """
        folder = cls(path.expanduser().absolute())
        if not folder.holds_run():
            raise RunFolderError(f"{folder.path} holds no run: it has neither {RUN} nor {_CONFIG}")
        folder._check_format()
        try:
            folder._check_same(configfile.load(folder.path / _CONFIG))
            whole = folder._known is not None
        except ConfigError:
            whole = False
        if not whole:
            folder._describe(folder.config)
        return folder

    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / RUN).exists() or (self.path / _CONFIG).exists()

    def held(self) -> AbstractContextManager[None]:
        """Keep every other process away from the run within.

        Raises:
            RunFolderError: another process is at work on it.
        """
        instead = "wait until it has ended, or choose another --run-dir"
        return lock.held(self.path, f"the run in {self.path}", instead)

    def _check_format(self) -> None:
        known = self._known
        if known is None and not (self.path / RUN).exists():
            raise RunFolderError(
                f"{self.path} was made by an older version of fedlora, whose layout this one does not continue (it has "
                f"no {RUN}); finish it with that version, or choose another --run-dir"
            )
        if known is not None and known["format"] != FORMAT:
            raise RunFolderError(
                f"{self.path} has layout {known['format']} of fedlora {known['versions']['fedlora']}, and this version "
                f"({_versions()['fedlora']}) continues layout {FORMAT}; finish it with that version, or choose another "
                "--run-dir"
            )

    def _check_same(self, config: RunConfig) -> None:
        self._check_format()
        old = self.config
        if old.digest() == config.digest():
            return
        before, now = (configfile.flatten(c.model_dump(mode="json")) for c in (old, config))
        changed = [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in now if before.get(key) != now[key]]
        raise RunFolderError(
            f"{self.path} holds a run with another configuration ({'; '.join(changed[:3])}); choose another --run-dir"
        )

    def _describe(self, config: RunConfig) -> None:
        """Write `run.json` and `config.yaml`; a run that was begun keeps its id, and the versions it began with."""
        known = self._known or {"format": FORMAT, "id": uuid.uuid4().hex, "versions": _versions()}
        self.write_json(RUN, {**known, "config": config.model_dump(mode="json")})
        write_atomic(self.path / _CONFIG, configfile.to_yaml(config).encode())
        for name in ("_known", "id", "config", "strategy"):
            self.__dict__.pop(name, None)

    @cached_property
    def _known(self) -> Any | None:
        """`run.json`, or None where it is missing or damaged."""
        return self.read_json(RUN)

    @cached_property
    def id(self) -> str:
        """What tells this run from every other, also from an earlier one in the same folder."""
        return str((self._known or self.need_json(RUN))["id"])

    def other_versions(self) -> list[str]:
        """Packages that have changed since the run began and may change its bits: `torch was 2.13.0, is 2.14.0`.

        Raises:
            RunFolderError: `run.json` is missing or damaged.
        """
        known = (self._known or self.need_json(RUN))["versions"]
        return [f"{name} was {known[name]}, is {now}" for name, now in _versions().items() if known.get(name) != now]

    @cached_property
    def config(self) -> RunConfig:
        """The configuration that the run began with.

        Raises:
            RunFolderError: it is damaged in both of the places where it is kept.
        """
        if self._known is not None:
            return configfile.build(configfile.flatten(self._known["config"]))
        try:
            return configfile.load(self.path / _CONFIG)
        except ConfigError as error:
            raise RunFolderError(f"{self.path}: {RUN} and {_CONFIG} are both damaged ({error}); start anew") from None

    @cached_property
    def strategy(self) -> Strategy:
        """The strategy of the run, with its options.

        Raises:
            ConfigError: it is not installed here.
        """
        return registry.make(self.config.strategy, self.config.strategy_options)

    @cached_property
    def objective(self) -> Objective:
        """What the run learns.

        Raises:
            ConfigError: there is no such task here.
        """
        return objective.find(self.config.task)

    @cached_property
    def score(self) -> Score:
        """The score that decides.

        Raises:
            ConfigError: there is no such task here.
        """
        return self.objective.score_of(self.config)

    def write_json(self, name: str, content: Any, durable: bool = True) -> None:
        """Write a JSON file; a mapping gets a seal, by which damage is found."""
        if isinstance(content, Mapping):
            content = {**content, _SEAL: _seal(json.loads(json.dumps(content)))}
        write_json(self.path / name, content, durable=durable)

    def read_json(self, name: str) -> Any | None:
        """The content of a JSON file of the run, without its seal, or None when it is not there or damaged."""
        try:
            content = limits.read_json(self.path / name, _LARGEST_JSON)
        except (OSError, ValueError):
            return None
        if isinstance(content, dict) and content.pop(_SEAL, None) != _seal(content):
            return None
        return content

    def need_json(self, name: str) -> Any:
        """The content of a JSON file that the run cannot do without.

        Raises:
            RunFolderError: it is not there or damaged.
        """
        content = self.read_json(name)
        if content is None:
            raise RunFolderError(
                f"{self.path / name} is missing or damaged; `fedlora resume` goes back to the last point that is whole"
            )
        return content

    # -- tensors with a JSON record beside them; the record is written last and carries the digest ------------------

    def write_tensors(
        self,
        stem: str,
        tensors: Mapping[str, Tensor],
        record: Mapping[str, Any],
        on_the_way: Callable[[bytes], bytes] = bytes,
        durable: bool = True,
    ) -> None:
        """`<stem>.safetensors` and then `<stem>.json` with `record` and the digest of the tensors.

        Args:
            stem: of both files.
            tensors: to write.
            record: what else is known of them.
            on_the_way: what a faulty channel makes of the file after its digest was taken.
            durable: wait until they are on the disk.
        """
        content = serialise(tensors)
        write_atomic(self.path / f"{stem}.safetensors", on_the_way(content), durable)
        self.write_json(f"{stem}.json", {**record, "digest": hashlib.sha256(content).hexdigest()}, durable)

    def read_record(self, stem: str) -> dict[str, Any] | None:
        """The record of `<stem>`, or None unless both files are there and the digest holds."""
        record = self.read_json(f"{stem}.json")
        if not isinstance(record, dict):
            return None
        return record if self.digest_of(f"{stem}.safetensors") == record.get("digest") else None

    def digest_of(self, name: str) -> str | None:
        """The SHA-256 of a file, or None where it cannot be read."""
        try:
            with (self.path / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None

    def read_tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors of `<stem>`.

        Raises:
            RunFolderError: missing or damaged.
        """
        return self._read_whole(stem)[1]

    def _read_whole(self, stem: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The record and the tensors of `<stem>`, each looked at once."""
        path = self.path / f"{stem}.safetensors"
        record = self.read_record(stem)
        if record is None:
            raise RunFolderError(
                f"{path} is missing or damaged; `fedlora resume` goes back to the last point that is whole"
            )
        try:
            return record, read_tensors(path)
        except AdapterError as error:
            raise RunFolderError(str(error)) from None

    # -- what the rounds hold -------------------------------------------------------------------------------------

    def round_folder(self, number: int) -> Path:
        return self.path / "rounds" / f"{number:03d}"

    def client_stem(self, number: int, client: int) -> str:
        return f"rounds/{number:03d}/client-{client:03d}"

    def roll_name(self, number: int) -> str:
        """The file that says who was asked in a round, and what became of each."""
        return f"rounds/{number:03d}/roll.json"

    def record_name(self, number: int) -> str:
        """The file that marks a round as complete."""
        return f"rounds/{number:03d}/record.json"

    def state_stem(self, number: int) -> str:
        return f"rounds/{number:03d}/state"

    def read_state(self, number: int) -> ServerState:
        """The strategy's state after a round (0: before training).

        Raises:
            RunFolderError: missing or damaged.
        """
        record, tensors = self._read_whole(self.state_stem(number))
        return states.from_tensors(tensors, record["state"])

    def write_state(self, state: ServerState, record: Mapping[str, Any]) -> None:
        complete = {
            **record,
            "state": states.scalars(state),
            "base_bytes": state.base_step.wire_bytes(),
        }
        self.write_tensors(self.state_stem(state.round), states.tensors(state), complete)

    def closed(self) -> Iterator[dict[str, Any]]:
        """The records of the rounds that are complete, in order, without a gap; each is read when it is come to."""
        for number in count():
            record = self.read_json(self.record_name(number))
            if record is None:
                return
            yield record

    def finished_rounds(self) -> list[int]:
        """Rounds that are complete, in order, without a gap."""
        return [number for number, _ in enumerate(self.closed())]


def _seal(content: Mapping[str, Any]) -> str:
    """The digest of a mapping as it is read from JSON."""
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def _versions() -> dict[str, str]:
    """Of ourselves and of what decides the bits of a result."""
    return {"fedlora": __version__, **{name: version(name) for name in _DECIDING}}
