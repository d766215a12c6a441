"""A folder that is kept in a store elsewhere (any URL that fsspec knows), and worked on in a copy on this disk.

Such a store renames nothing and locks nothing. Files are written, and then a record of all their digests, `files.json`:
what it lists is what the folder holds. Who works on it has a lease, `lease.json`, which is renewed and runs out. A copy
that was the last to write the record is ahead of the store, and is gone on with; any other is made like it first.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import psutil

from fedlora.errors import ConfigError, RunFolderError, first_line
from fedlora.files import digests, home, lock
from fedlora.files.atomic import Stamp, stamp, write_atomic

RECORD, LEASE = "files.json", "lease.json"
LEASE_S = 90.0
"""How long a lease holds; the clocks of machines may differ by less than half of it."""
_RENEW_S = 20.0
_PUSH_S = 2.0
_SETTLE_S = 0.5
"""Between writing a lease and looking whether it is still ours."""
_BATCH = 2**26
"""Bytes that are moved at a time."""
_OWN = (RECORD, LEASE, lock.FILE)
_URL = ".url"
"""In a copy: of what."""
_WRITTEN = ".written"
"""In a copy: which record it has seen or written last."""
OF_A_COPY = (_URL, _WRITTEN)
_LAST = ("record.json",)


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a path of this disk."""
    return "://" in place


@dataclass(frozen=True)
class _Held:
    """What the record says of a file."""

    digest: str
    size: int


def copy_of(url: str) -> Path:
    """The folder on this disk in which a folder that is kept elsewhere is worked on."""
    return home.copies() / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:24]


def url_of(folder: Path) -> str | None:
    """Where a folder is kept that this one is the copy of; None for a folder of this disk."""
    try:
        return (folder / _URL).read_text("utf-8")
    except (OSError, ValueError):
        return None


class Remote:
    """A folder in a store.

    Args:
        url: of the folder.

    Raises:
        ConfigError: no store of this kind is known, its package is missing, or the URL holds a password.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        if ":" in urlsplit(url).netloc.rpartition("@")[0]:
            raise ConfigError(
                f"{url.partition('://')[0]}://… holds a password, and the URL of a run folder is written down; give it "
                "as the store's package takes it, in the environment or a file of its own"
            )
        self.url = url.rstrip("/")
        how = {"auto_mkdir": True} if url.startswith(("file://", "local://")) else {}
        try:
            self._store, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **how)
        except ImportError as error:
            raise ConfigError(f"{url}: {first_line(error)}; pip install the package for it, for S3 s3fs") from None
        except ValueError as error:
            raise ConfigError(f"{url} is no place to keep a folder: {first_line(error)}") from None
        self._root = str(root).rstrip("/")
        self._pushed: dict[str, tuple[Stamp | None, _Held]] = {}
        self._record = ""
        self._token, self._lost = uuid.uuid4().hex, ""
        self._one = threading.Lock()

    # -- what the store is asked ------------------------------------------------------------------------------------

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except (RunFolderError, ConfigError):
            raise
        except PermissionError as error:
            raise RunFolderError(f"{self.url} may not be used with these credentials: {first_line(error)}") from None
        except Exception as error:
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                raise RunFolderError(
                    f"{self.url} needs credentials, and there are none; set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or a profile"
                ) from None
            if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _CLIENTS:
                raise
            raise RunFolderError(f"{self.url} cannot be used: {first_line(error)}") from error

    def _read(self, name: str) -> bytes | None:
        try:
            content: bytes = self._store.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        return content

    def _json(self, name: str) -> Any:
        content = self._read(name)
        try:
            return None if content is None else json.loads(content)
        except ValueError:
            return None

    def _recorded(self) -> tuple[str, dict[str, _Held]]:
        """Which record there is, and what it lists."""
        found = self._json(RECORD)
        if not isinstance(found, Mapping):
            return "", {}
        return found["record"], {name: _Held(*each) for name, each in found["files"].items() if _is_inside(name)}

    # -- who works on it ----------------------------------------------------------------------------------------------

    def take(self) -> None:
        """Take the lease.

        Raises:
            RunFolderError: somebody else has it.
        """
        with self._asking():
            found = self._json(LEASE)
            if isinstance(found, Mapping) and not _over(found):
                until = time.strftime("%H:%M:%S", time.localtime(found["until"]))
                raise RunFolderError(
                    f"the run in {self.url} is under way ({found['holder']}, whose lease ends at {until} unless it is "
                    "renewed); wait until it has ended, or choose another --run-dir"
                )
            self._renew()
            time.sleep(_SETTLE_S)
            self._see_that_it_is_ours()

    def _renew(self) -> None:
        holder = {"holder": f"{socket.gethostname()}:{os.getpid()}", "token": self._token}
        self._store.pipe_file(f"{self._root}/{LEASE}", json.dumps({**holder, "until": time.time() + LEASE_S}).encode())

    def _see_that_it_is_ours(self) -> None:
        found = self._json(LEASE)
        if isinstance(found, Mapping) and found.get("token") == self._token:
            return
        self._lost = f"the lease of the run in {self.url} was taken by {(found or {}).get('holder', 'somebody')}"
        raise RunFolderError(f"{self._lost}; this one stops, and its copy on this disk is not written there any more")

    def release(self) -> None:
        """Give the lease back."""
        if not self._lost:
            with suppress(Exception):
                self._store.rm_file(f"{self._root}/{LEASE}")

    # -- what is in it ------------------------------------------------------------------------------------------------

    def pull(self, folder: Path) -> None:
        """Make the copy on this disk hold what the store's record says, and nothing else, unless it is ahead of it.

        Raises:
            RunFolderError: the store does not answer, or the copy cannot be written.
        """
        with self._asking():
            self._record, recorded = self._recorded()
            here = {name: folder / name for name in _names(folder)}
            if ahead := bool(self._record) and _seen_by(folder) == self._record:
                lacking = [name for name in recorded if name not in here]
            else:
                for name in here.keys() - recorded.keys():
                    here[name].unlink(missing_ok=True)
                lacking = [name for name, held in recorded.items() if not _is(folder / name, held)]
            for batch in _batches({name: recorded[name].size for name in lacking}):
                found = self._store.cat([f"{self._root}/{name}" for name in batch], on_error="return")
                for name in batch:
                    content = found[f"{self._root}/{name}"]
                    if isinstance(content, bytes):
                        write_atomic(folder / name, content, durable=False)
                    elif not isinstance(content, FileNotFoundError):  # which is there, and must not count as gone
                        raise content
            same = (name for name, held in recorded.items() if _is(folder / name, held)) if ahead else recorded
            self._pushed = {name: (stamp(folder / name), recorded[name]) for name in same}
            self._note(folder)

    def _note(self, folder: Path) -> None:
        """Which record the copy has seen."""
        write_atomic(folder / _URL, self.url.encode(), durable=False)
        write_atomic(folder / _WRITTEN, self._record.encode(), durable=False)

    def push(self, folder: Path) -> int:
        """Write what has changed in the copy since it was written last, and then the record; how many files.

        Files of a client or a state are there before the JSON that names their digest, and that of a round last.

        Raises:
            RunFolderError: the store does not answer, or somebody else has taken the lease.
        """
        with self._one, self._asking():
            if self._lost:
                raise RunFolderError(f"{self._lost}; nothing is written there any more")
            now = {name: stamp(folder / name) for name in _names(folder)}
            changed = [name for name, state in now.items() if state and self._pushed.get(name, (None,))[0] != state]
            gone = self._pushed.keys() - now.keys()
            if not changed and not gone:
                return 0
            self._see_that_it_is_ours()
            for batch in _batches({name: (now[name] or (0, 0, 0))[2] for name in sorted(changed, key=_order)}):
                self._write(folder, batch, now)
            for name in gone:
                del self._pushed[name]
            self._record = uuid.uuid4().hex
            files = {name: [held.digest, held.size] for name, (_, held) in self._pushed.items()}
            content = json.dumps({"record": self._record, "files": files})
            self._store.pipe_file(f"{self._root}/{RECORD}", content.encode())
            self._note(folder)
            for name in gone:
                with suppress(FileNotFoundError):
                    self._store.rm_file(f"{self._root}/{name}")
            return len(changed)

    def _write(self, folder: Path, names: list[str], now: Mapping[str, Stamp | None]) -> None:
        contents = {}
        for name in names:
            with suppress(FileNotFoundError):  # pruned meanwhile
                contents[name] = (folder / name).read_bytes()
        self._store.pipe({f"{self._root}/{name}": content for name, content in contents.items()})
        for name, content in contents.items():
            self._pushed[name] = now[name], _Held(hashlib.sha256(content).hexdigest(), len(content))

    def fetched(self) -> Path:
        """The copy on this disk, as the store has it now (or ahead of it).

        Raises:
            RunFolderError: the store does not answer, or the copy cannot be written.
        """
        folder = copy_of(self.url)
        self.pull(folder)
        return folder

    @contextmanager
    def worked_on(self, say: Callable[[str], None] = lambda line: None) -> Iterator[Path]:
        """The copy; within, it is written to the store every few seconds, and the lease is renewed; at the end all of
        it.

        Args:
            say: is told where the store does not answer, and when it does again.

        Raises:
            RunFolderError: it is held by somebody else, or the end of it could not be written: it is whole in the copy.
        """
        folder = copy_of(self.url)
        self.take()
        try:
            self.pull(folder)  # a copy that is not whole must not be written back
            with self._kept_up(folder, say):
                yield folder
        finally:
            self.release()

    @contextmanager
    def _kept_up(self, folder: Path, say: Callable[[str], None]) -> Iterator[None]:
        ended = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(folder, ended, say), daemon=True, name="remote")
        keeper.start()
        try:
            yield
        finally:
            ended.set()
            keeper.join()
            self._push_at_last(folder)

    def commit(self, folder: Path) -> None:
        """Write the copy to the store now; where the store does not answer, later.

        Raises:
            RunFolderError: somebody else has taken the lease.
        """
        try:
            self.push(folder)
        except RunFolderError:
            if self._lost:
                raise

    def _push_at_last(self, folder: Path) -> None:
        for pause in (1, 2, 4, 8, 0):
            try:
                self.push(folder)
                return
            except RunFolderError as error:
                if not pause or self._lost:
                    raise RunFolderError(
                        f"{error}. What is not written there is whole in {folder}; once the store answers, the same "
                        "command with the same --run-dir continues"
                    ) from None
                time.sleep(pause)

    def _keep(self, folder: Path, ended: threading.Event, say: Callable[[str], None]) -> None:
        renewed, silent = time.monotonic(), False
        while not ended.wait(_PUSH_S):
            try:
                if time.monotonic() - renewed > _RENEW_S:
                    with self._asking():
                        self._see_that_it_is_ours()
                        self._renew()
                    renewed = time.monotonic()
                self.push(folder)
            except RunFolderError as error:
                if not silent:
                    say(f"{error}. The run goes on in its copy on this disk, {folder}")
                silent = True
                if self._lost:
                    return
            else:
                if silent:
                    say(f"{self.url} answers again and has everything")
                silent = False


_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "adlfs", "azure", "google", "fsspec", "requests")
"""Whose errors say that a store cannot be used."""


def _over(lease: Mapping[str, Any]) -> bool:
    """Whether a lease has run out, or its holder was a process of this machine that has ended."""
    host, _, process = str(lease.get("holder", "")).rpartition(":")
    if host == socket.gethostname() and process.isdigit() and not psutil.pid_exists(int(process)):
        return True
    until = lease.get("until")
    return not isinstance(until, int | float) or until < time.time()


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and not PurePosixPath(name).is_absolute()


def _names(folder: Path) -> list[str]:
    """The files of a copy that are kept in the store."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    names = (path.relative_to(folder).as_posix() for path in found)
    return [name for name in names if name not in _OWN]


def _order(name: str) -> tuple[int, str]:
    last = name.rsplit("/", 1)[-1]
    return (2 if last in _LAST else name.endswith(".json")), name


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in their order, in groups that are not too many bytes and do not mix what must follow each other."""
    batch: list[str] = []
    total, kind = 0, None
    for name, size in sizes.items():
        of = _order(name)[0]
        if batch and (total + size > _BATCH or of != kind):
            yield batch
            batch, total = [], 0
        batch.append(name)
        total, kind = total + size, of
    if batch:
        yield batch


def _seen_by(folder: Path) -> str | None:
    try:
        return (folder / _WRITTEN).read_text("utf-8")
    except (OSError, ValueError):
        return None


def _is(path: Path, held: _Held) -> bool:
    """Whether a file has the content that the record says."""
    try:
        return path.stat().st_size == held.size and digests.of_file(path) == held.digest
    except OSError:
        return False
