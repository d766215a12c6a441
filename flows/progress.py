"""How a run tells what it does: to Prefect's log always, and to a terminal when the command line asked for it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

from prefect import runtime
from prefect.logging import get_run_logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Column

from fedlora import metrics, objective
from fedlora.config import RunConfig
from fedlora.errors import counted
from fedlora.metrics import RoundRecord
from fedlora.run.play import Observer


def round_line(record: RoundRecord, of: int, score: str) -> str:
    """A round's scores as one line; `score` is the one that decides."""
    what = "before training" if record.round == 0 else f"round {record.round}/{of}"
    local = {"local": f"local/{score}"}
    return f"{what:<16} {scores(record, score, local)}  ({record.metrics[metrics.TIME_ROUND]:.1f} s)"


def scores(record: RoundRecord, score: str, more: Mapping[str, str] = MappingProxyType({})) -> str:
    """Global score and ρ of a round, and `more` metrics by the word they are shown as."""
    shown = {score: f"global/{score}", **more, "ρ": metrics.RHO_MODEL}
    return "  ".join(f"{word} {record.metrics[name]:.3f}" for word, name in shown.items() if name in record.metrics)


def _score(config: RunConfig) -> str:
    return objective.score_of(config).name


def _size(config: RunConfig) -> str:
    return f"{counted(config.clients, 'client')}, {counted(config.rounds, 'round')}"


class Progress(Observer):
    """Silent on the terminal; the base of the ones that are not."""

    _away = False
    flow_run = ""
    """The Prefect flow run that is shown; of a sweep, its own."""

    def for_run(self) -> Progress:
        """The same display, for one of several runs that may go on side by side."""
        return self

    def begin(self, config: RunConfig, label: str) -> None:
        """A run begins."""

    def delivery(self, waits: str) -> None:
        """Something was offered to MLflow; `waits` says why not all of it was taken. Told when that changes."""
        if waits and not self._away:
            self.say(f"{waits}. The run goes on; what MLflow has not taken waits in the run folder")
        if self._away and not waits:
            self.say("MLflow answers again and has all rounds")
        self._away = bool(waits)

    def trained(self) -> None:
        self.say("writing the adapter, tables and figures")

    def results(self, page: str, folder: Path) -> None:
        """The run is complete: its page in MLflow, and its folder. A terminal is told of them by the command itself."""

    def end(self) -> None:
        """The run is over, whether well or not."""


class LogProgress(Progress):
    """A line per round: for files, pipes and CI."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream, self._begun, self._label, self._rounds = stream, time.monotonic(), "", 0
        self._score = ""

    def for_run(self) -> Progress:
        return copy(self)

    def begin(self, config: RunConfig, label: str) -> None:
        self._label, self._rounds, self._score = label, config.rounds, _score(config)
        self.say(f"{_size(config)}, {config.model.name} on {config.data.name}")

    def say(self, line: str) -> None:
        prefix = f"{self._label}: " if self._label else ""
        print(f"[{time.monotonic() - self._begun:6.1f} s] {prefix}{line}", file=self._stream, flush=True)

    def round(self, record: RoundRecord) -> None:
        self.say(round_line(record, self._rounds, self._score))


class BarProgress(Progress):
    """A live bar per run: for terminals."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.fields[label]:<12}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=14),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            console=console,
        )
        self._task = self._bars.add_task("", visible=False, label="")
        self._per_round, self._rounds, self._score = 1, 0, ""
        self._last = ""
        self._bars.start()

    def for_run(self) -> Progress:
        return copy(self)

    def begin(self, config: RunConfig, label: str) -> None:
        self._per_round, self._rounds, self._score = config.clients_per_round, config.rounds, _score(config)
        self._task = self._bars.add_task("preparing data and model", total=config.rounds * self._per_round, label=label)

    def say(self, line: str) -> None:
        self._bars.console.print(line, highlight=False)

    def clients(self, number: int, done: int, of: int) -> None:
        self._bars.update(self._task, completed=(number - 1) * self._per_round + done)

    def round(self, record: RoundRecord) -> None:
        self._bars.update(self._task, description=f"round {record.round}/{self._rounds}  {scores(record, self._score)}")

    def end(self) -> None:
        self._bars.stop_task(self._task)

    def close(self) -> None:
        """Give the terminal back."""
        self._bars.stop()


_current: ContextVar[Progress | None] = ContextVar("progress", default=None)


class Tee(Progress):
    """To the terminal's progress, and to the log of the Prefect flow run."""

    def __init__(self, shown: Progress) -> None:
        self._shown, self._log, self._rounds, self._score = shown.for_run(), get_run_logger(), 0, ""

    def begin(self, config: RunConfig, label: str) -> None:
        self._rounds, self._score = config.rounds, _score(config)
        self._log.info("%s: %s", label, _size(config))
        self._shown.begin(config, label)

    def say(self, line: str) -> None:
        self._log.info("%s", line)
        self._shown.say(line)

    def clients(self, number: int, done: int, of: int) -> None:
        self._shown.clients(number, done, of)

    def round(self, record: RoundRecord) -> None:
        self._log.info("%s", round_line(record, self._rounds, self._score))
        self._shown.round(record)

    def results(self, page: str, folder: Path) -> None:
        self._log.info("results: %s", page)
        self._log.info("folder: %s", folder)

    def end(self) -> None:
        self._shown.end()


def current() -> Progress:
    """The progress of the flow run that is under way."""
    shown = _current.get() or Progress()
    shown.flow_run = shown.flow_run or str(runtime.flow_run.id or "")
    return Tee(shown)


@contextmanager
def shown_on(stream: TextIO) -> Iterator[Progress]:
    """Show the progress of flows called within: bars on a terminal, lines elsewhere."""
    console = Console(file=stream)
    live: Progress = BarProgress(console) if console.is_terminal else LogProgress(stream)
    live.say("starting Prefect and the workers")
    token = _current.set(live)
    try:
        yield live
    finally:
        _current.reset(token)
        if isinstance(live, BarProgress):
            live.close()
