"""How much memory a piece of work takes at its peak: of the GPU that it uses, or of the process that does it."""

from __future__ import annotations

import re
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_LINUX = Path("/proc/self")
_PEAK = re.compile(r"^VmHWM:\s+(\d+) kB", re.MULTILINE)


@dataclass
class Peak:
    """Most bytes held while a piece of work was under way; zero while it is."""

    bytes: int = 0


class _Watches:
    """What is being watched on one device. There is one mark per device, which each watch sets back when it begins: so
    what the mark says before that is told to those under way."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, list[Peak]] = {}

    def begin(self, device: str) -> Peak:
        with self._lock:
            self._tell(device)
            _set_back(device)
            watch = Peak()
            self._open.setdefault(device, []).append(watch)
            return watch

    def end(self, device: str, watch: Peak) -> None:
        with self._lock:
            self._tell(device)
            self._open[device] = [each for each in self._open[device] if each is not watch]

    def _tell(self, device: str) -> None:
        if watches := self._open.get(device):
            most = peak(device)
            for each in watches:
                each.bytes = max(each.bytes, most)


_watches = _Watches()


@contextmanager
def watched(device: str) -> Iterator[Peak]:
    """The peak of what is done within, in `bytes` afterwards.

    On a GPU: what PyTorch had allocated there. Elsewhere: the resident memory of this process, all of it, with what was
    there before (interpreter, libraries, the base model) and what other threads hold meanwhile. Where the system does
    not let the mark be set back (only Linux does), it is the peak since the process began.
    """
    watch = _watches.begin(device)
    try:
        yield watch
    finally:
        _watches.end(device, watch)


def peak(device: str) -> int:
    """Most bytes of a GPU, or else of this process, since the process began or a watch did."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError):
        if found := _PEAK.search((_LINUX / "status").read_text("ascii", "replace")):
            return int(found[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _set_back(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        (_LINUX / "clear_refs").write_text("5", "ascii")
