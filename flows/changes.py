"""Two executions side by side: what changed, as a page beside the later one's report, and since the last night."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from prefect.artifacts import create_markdown_artifact

from fedlora import report
from fedlora.errors import ConfigError, FedloraError
from fedlora.files import home
from fedlora.report import changewords
from fedlora.report.changes import Changes
from fedlora.report.changes import compare as compared
from fedlora.sweep.folder import SweepFolder
from flows.report import default_folder, log, logged, of_condition, plain
from mlflow_tracking import compare, store
from mlflow_tracking.compare import Source

PREVIOUS = "previous"
"""Means the execution before the other, of the same name and plan."""


@dataclass(frozen=True)
class Written:
    """What changed, the page that says it, and where that was logged."""

    page: Path
    changes: Changes
    link: str

    @property
    def sentences(self) -> list[str]:
        """What changed, in words."""
        return changewords.sentences(self.changes)


@dataclass(frozen=True)
class Since:
    """What changed since the last execution of a sweep, as its flow run says it."""

    line: str
    written: Written | None = None

    @property
    def regression(self) -> bool:
        """Whether a score is worse beyond noise."""
        return self.written is not None and bool(self.written.changes.worse)


def between(before: str, after: str, uri: str | None = None, task: str | None = None) -> tuple[Changes, Source]:
    """What changed from one sweep or experiment to another, and what the other is.

    Args:
        before: a sweep's name or execution, `previous` (the finished execution before the other), or an experiment.
        after: a sweep's name or execution, `latest`, or an experiment.
        uri: the tracking store. None: as everywhere.
        task: the runs of it alone, where one of them holds several.

    Raises:
        TrackingError: the store does not answer, or there is no such sweep or experiment.
        ConfigError: both are the same, or there is none before.
        FedloraError: one has no finished run, or they have nothing in common.
    """
    resolved = store.resolve_uri(uri)
    later = compare.find(after, resolved)
    earlier = compare.find(_previous(later) if before == PREVIOUS else before, resolved)
    if earlier.instance == later.instance:
        raise ConfigError(
            f"'{before}' and '{after}' are both {later.instance}; name two executions, or `fedlora report {PREVIOUS} "
            f"{after}` for what changed since the one before"
        )
    one, other = (replace(compare.gather(each, resolved, task), title=each.instance) for each in (earlier, later))
    return compared(one, other), later


def write(
    before: str, after: str, out: str | Path | None = None, uri: str | None = None, task: str | None = None
) -> Written:
    """Write what changed beside the later one's report, and log it to its run in MLflow. As `between`.

    Args:
        before: the earlier one.
        after: the later one.
        out: a folder. None: that of the later one's report.
        uri: the tracking store.
        task: the runs of it alone.

    Raises:
        RunFolderError: the folder cannot be written.
        FedloraError: as `between`.
    """
    resolved = store.resolve_uri(uri)
    changes, later = between(before, after, resolved, task)
    folder = Path(out).expanduser().absolute() if out else default_folder(later, task)
    page = report.write_changes(changes, folder)
    log(later, resolved, [folder / name for name in report.CHANGES])
    return Written(page, changes, logged(later, resolved, page))


def _previous(later: Source) -> str:
    found = SweepFolder(home.sweeps() / later.instance).before() if later.parent is not None else None
    if found is None:
        raise ConfigError(f"{later.instance} has no finished execution of the same name and plan before it")
    return found.instance


def since_last(folder: SweepFolder, uri: str) -> Since:
    """What changed since the last finished execution of a sweep that has just ended. A comparison that fails is said
    and no more, for it must not lose the sweep."""
    last = folder.before()
    if last is None:
        return Since("the first execution of this name and plan: there is none to compare with")
    try:
        written = write(last.instance, folder.instance, folder.path / "report", uri)
    except FedloraError as error:
        return Since(f"not compared with {last.instance}: {error}")
    return Since(changewords.headline(written.changes), written)


def publish(since: Since, name: str) -> None:
    """Tell of it on the flow run's page in Prefect, a night after the other under one key."""
    create_markdown_artifact("\n".join(summary(since)), key="sweep-changes", description=name)


def summary(since: Since) -> list[str]:
    """The lines of it in Markdown: the sentences, and a table of scores for each condition."""
    if since.written is None:
        return [plain(since.line)]
    changes = since.written.changes
    lines = [f"## From {changes.before} to {changes.after}", *(f"\n{plain(each)}" for each in since.written.sentences)]
    for condition in dict.fromkeys(cell.condition for cell in changes.cells):
        lines += of_condition(condition, changewords.table(changes, condition))
    return [*lines, "", f"[What changed]({since.written.link}), on disk `{since.written.page}`"]
