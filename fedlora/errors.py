"""Errors a user can act on.

Everything that is the user's to mend is a `FedloraError`: one line that names the thing, the value, what was
expected and what to do. The command line prints that line and nothing else; anything that is *not* a
`FedloraError` is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class FedloraError(Exception):
    """Base of all errors whose cause and cure are known; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(FedloraError):
    """A key or value of the configuration is wrong; nothing has been loaded yet."""

    exit_code = 2


class StrategyRefusal(ConfigError, ValueError):
    """A strategy cannot be carried out with a setting; a sweep leaves such a run out. (A ValueError for pydantic.)"""


class DataError(FedloraError):
    """A data set cannot be read, or cannot be partitioned as asked."""

    exit_code = 2


class ModelError(FedloraError):
    """A model cannot be loaded, or the adapter asked for does not fit it."""

    exit_code = 2


class AdapterError(FedloraError):
    """Adapter weights are malformed: missing module, wrong shape, non-finite value, unreadable file."""

    exit_code = 2


class RunFolderError(FedloraError):
    """A run folder cannot be written, or does not hold what it should."""


class TrackingError(FedloraError):
    """The tracking store does not answer or refuses what is written."""


class WorkerError(FedloraError):
    """A worker process died under a job (out of memory, killed); the job may be tried again."""


def worth_retrying(error: BaseException | None) -> bool:
    """Whether a step may be tried again: after a dead worker or a passing fault of the system, but not after what the
    user must mend."""
    return isinstance(error, WorkerError) or not isinstance(error, FedloraError)


class RunAborted(FedloraError):
    """A run stopped part-way; what was finished is kept in its folder."""


class ClientFailed(RunAborted):
    """A client could not train, for a reason of its own; the round may go on without it."""


class UpdateRejected(FedloraError):
    """A client's update is not what was asked for, so it does not reach the aggregate."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint ` Did you mean 'x'?` with the nearest of `known`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def remembered(most: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: remember what a function returned for its latest `most` arguments (hashable), or, unlike
    `lru_cache`, which error of ours it raised."""

    def remember(function: Callable[P, T]) -> Callable[P, T]:
        @lru_cache(maxsize=most)
        def outcome(*args: P.args, **kwargs: P.kwargs) -> T | FedloraError:
            try:
                return function(*args, **kwargs)
            except FedloraError as error:
                return error

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            found = outcome(*args, **kwargs)  # type: ignore[arg-type]
            if isinstance(found, FedloraError):
                raise found.with_traceback(None)
            return found

        return call

    return remember


def counted(number: int, one: str, many: str = "") -> str:
    """`1 round`, `8 rounds`; `many` where an s is not enough. For everything that people read, errors or not."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def listed(numbers: Sequence[int], most: int = 4) -> str:
    """Numbers in words, neighbours as a range: `3`, `0–4, 7`; of more than `most` ranges the first, the last and how
    many there are."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    if len(ranges) > most:
        return f"{numbers[0]} … {numbers[-1]} ({len(numbers)})"
    return ", ".join("–".join(map(str, each)) for each in ranges)


def first_line(error: Exception) -> str:
    """The first line of what another library says is wrong, or the error's kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def saving(path: Path, instead: str = "another --run-dir") -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into one line that says what to do (choose `instead`).

    Raises:
        RunFolderError: no space, no permission, a read-only file system, or a file where a folder should be.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunFolderError(
                f"no space left while saving {path}; what was saved before is intact. "
                "Free some space, then run again with the same --run-dir to continue."
            ) from error
        raise RunFolderError(f"cannot write {path}: {error.strerror or error}. Choose {instead}.") from error
