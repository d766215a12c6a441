"""A run's state on disk: written atomically, checked by digest, so that whatever is there is whole.

config.yaml  setup.json  partition.npz  adapter_config.json
rounds/000/  state.{safetensors,json}  record.json            before training
rounds/003/  client-007.{safetensors,json}  state.{safetensors,json}  record.json
adapter/     the final adapter            figures/  tables/
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fedlora import configfile, statefile
from fedlora.atomic import write_atomic
from fedlora.config import RunConfig
from fedlora.errors import AdapterError, RunFolderError
from fedlora.strategies.base import ServerState
from fedlora.tensorfile import read_tensors, serialise

FORMAT = 2
"""Version of this layout, written to `setup.json`."""


class RunFolder:
    """Typed access to one run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunFolder:
        """A folder for `config`; an existing one is continued if it was made with the same configuration.

        Raises:
            RunFolderError: not writable, holds something else, or was made with another configuration.
        """
        folder = cls(path.expanduser().absolute())
        existing = folder.path / "config.yaml"
        if existing.exists():
            folder._check_same(config)
        elif folder.path.is_dir() and any(folder.path.iterdir()):
            raise RunFolderError(f"{folder.path} is not empty and holds no run; choose another --run-dir")
        write_atomic(existing, configfile.to_yaml(config).encode())
        return folder

    def _check_same(self, config: RunConfig) -> None:
        old = self.config
        if old.digest() == config.digest():
            return
        before, now = (configfile.flatten(c.model_dump(mode="json")) for c in (old, config))
        changed = [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in now if before.get(key) != now[key]]
        raise RunFolderError(
            f"{self.path} holds a run with another configuration ({'; '.join(changed[:3])}); choose another --run-dir"
        )

    @cached_property
    def config(self) -> RunConfig:
        return configfile.load(self.path / "config.yaml")

    def write_json(self, name: str, content: Any) -> None:
        write_atomic(self.path / name, (json.dumps(content, indent=1) + "\n").encode())

    def read_json(self, name: str) -> Any | None:
        """The content of a JSON file of the run, or None when it is not there or damaged."""
        try:
            return json.loads((self.path / name).read_text())
        except (OSError, ValueError):
            return None

    def need_json(self, name: str) -> Any:
        """The content of a JSON file that the run cannot do without.

        Raises:
            RunFolderError: it is not there or damaged.
        """
        content = self.read_json(name)
        if content is None:
            raise RunFolderError(f"{self.path / name} is missing or damaged; run again with a new --run-dir")
        return content

    # -- tensors with a JSON record beside them; the record is written last and carries the digest ------------------

    def write_tensors(self, stem: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
        """`<stem>.safetensors` and then `<stem>.json` with `record` and the digest of the tensors."""
        content = serialise(tensors)
        write_atomic(self.path / f"{stem}.safetensors", content)
        complete = {**record, "digest": hashlib.sha256(content).hexdigest()}
        self.write_json(f"{stem}.json", complete)
        return complete

    def read_record(self, stem: str) -> dict[str, Any] | None:
        """The record of `<stem>`, or None unless both files are there and the digest holds."""
        record = self.read_json(f"{stem}.json")
        if not isinstance(record, dict):
            return None
        try:
            content = (self.path / f"{stem}.safetensors").read_bytes()
        except OSError:
            return None
        return record if hashlib.sha256(content).hexdigest() == record.get("digest") else None

    def read_tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors of `<stem>`.

        Raises:
            RunFolderError: missing or damaged.
        """
        path = self.path / f"{stem}.safetensors"
        if self.read_record(stem) is None:
            raise RunFolderError(
                f"{path} is missing or damaged; remove the folder {path.parent} and run again with the same --run-dir "
                "to have it made anew"
            )
        try:
            return read_tensors(path)
        except AdapterError as error:
            raise RunFolderError(str(error)) from None

    # -- what the rounds hold -------------------------------------------------------------------------------------

    def client_stem(self, number: int, client: int) -> str:
        return f"rounds/{number:03d}/client-{client:03d}"

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
        stem = self.state_stem(number)
        tensors = self.read_tensors(stem)
        return statefile.from_tensors(tensors, self.need_json(f"{stem}.json")["state"])

    def write_state(self, state: ServerState, record: Mapping[str, Any]) -> dict[str, Any]:
        complete = {
            **record,
            "state": statefile.scalars(state),
            "base_bytes": state.base_step.wire_bytes(),
            "base_total_bytes": state.base.wire_bytes(),
        }
        return self.write_tensors(self.state_stem(state.round), statefile.tensors(state), complete)

    def finished_rounds(self) -> list[int]:
        """Rounds that are complete, in order, without a gap."""
        return list(_without_gap(lambda number: self.read_json(self.record_name(number)) is not None))


def _without_gap(complete: Callable[[int], bool]) -> Iterator[int]:
    number = 0
    while complete(number):
        yield number
        number += 1
