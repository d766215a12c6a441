"""Which services inside a Prefect server have failed, as its log tells.

A server answers and looks healthy while one of its services (the scheduler, the one that marks late runs, …) fails each
time that it is due: nothing but the log says so. Prefect runs most of them through docket, which writes
`↩ [54ms] schedule_deployments(){…}` and a traceback; the others write `NAME service failed!` or under their own logger.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

DATE_FORMAT = {"PREFECT_LOGGING_FORMATTERS_STANDARD_DATEFMT": "%Y-%m-%d %H:%M:%S"}
"""For the server's environment: Prefect's own lines tell the time and no day."""
_TAIL = 4_000_000
"""Bytes of a long log that are looked at, from its end."""

_RECORD = re.compile(r"^(?P<when>(?:\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d)\.\d{3} \| (?P<level>[A-Z]+) *\| (?P<rest>.*)")
_RAISED = re.compile(r"^[A-Za-z_][\w.]*(: |:?$)")
"""The end of a traceback. What SQLAlchemy adds in lines of its own begins with a bracket."""
_TASK = re.compile(r"^\S+ - ↩ \[[^\]]*\] (?P<name>\w+)\(")
_SERVICE = re.compile(r"^\S+ - (?P<name>\w+) service failed!")
_LOGGER = re.compile(r"^prefect\.server\.(?:events\.)?(?:services\.)?(?P<name>[\w.]+) - ")
_PASSING = ("database is locked", "database table is locked")
"""SQLite's one writer was another process for too long: the service does its work when it is due again."""


@dataclass(frozen=True)
class Failure:
    """The last failure of one service."""

    service: str
    """As the log calls it, such as `schedule_deployments`."""
    when: str
    """Local time as the log has it; with the day where the server was started by `fedlora up`."""
    reason: str
    """The exception, or what was logged, in one line."""
    line: int
    """Where in the log its record begins, from 1."""
    times: int
    """How often that service has failed in what was read."""

    @property
    def passing(self) -> bool:
        """Whether it only came too late for SQLite's lock."""
        return any(words in self.reason for words in _PASSING)

    def told(self, log: Path) -> str:
        """In one line, with the place in the log."""
        return f"its service {self.service} failed at {self.when} with {self.reason} ({log}:{self.line})"


def failures(log: Path) -> list[Failure]:
    """The services that have failed, in order of their last failure; none where there is no log."""
    try:
        with log.open("rb") as file:
            skipped = max(0, log.stat().st_size - _TAIL)
            before = sum(file.read(min(_TAIL, skipped - at)).count(b"\n") for at in range(0, skipped, _TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return _read(text.split("\n"), before + 1)


def _read(lines: Iterable[str], first: int) -> list[Failure]:
    found: dict[str, Failure] = {}
    current: Failure | None = None
    for number, line in enumerate(lines, first):
        if record := _RECORD.match(line):
            current = _begun(record, number, found)
        elif current and _RAISED.match(line):  # the last one of a chain of tracebacks is what came out
            current = replace(current, reason=line.strip())
        if current:
            found[current.service] = current
    return sorted(found.values(), key=lambda failure: failure.line)


def _begun(record: re.Match[str], number: int, found: dict[str, Failure]) -> Failure | None:
    """The failure that a record of the log tells of, if it does."""
    if record["level"] not in ("ERROR", "CRITICAL"):
        return None
    named = next((match for each in (_TASK, _SERVICE, _LOGGER) if (match := each.match(record["rest"]))), None)
    if named is None:
        return None
    service, said = named["name"], record["rest"].partition(" - ")[2]
    times = found[service].times + 1 if service in found else 1
    return Failure(service, record["when"], said, number, times)
