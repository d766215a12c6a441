"""The report of a sweep or an experiment as a Prefect flow: gathered from MLflow, written, and logged beside it.

prefect deployment run 'report/latest'
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from deployments.local import environment

environment.prepare()

from prefect import flow  # noqa: E402 (the environment must be ready first)
from prefect.artifacts import create_link_artifact, create_markdown_artifact  # noqa: E402

from deployments import form  # noqa: E402
from fedlora import report  # noqa: E402
from fedlora.files import home  # noqa: E402
from fedlora.report import answers, boards, verdict  # noqa: E402
from fedlora.report.decision import Decision, decide  # noqa: E402
from fedlora.report.views import Table  # noqa: E402
from flows import progress, refusals  # noqa: E402
from mlflow_tracking import arrange, compare, store  # noqa: E402
from mlflow_tracking.compare import LATEST, Source  # noqa: E402
from mlflow_tracking.parents import Parent  # noqa: E402
from tasks import names, where  # noqa: E402

_FOLDER = "report"
"""Of the sweep's folder, and of the parent run's artifacts."""


@dataclass(frozen=True)
class Written:
    """A report: its page, what it compares, and where it was logged."""

    page: Path
    comparison: report.Comparison
    decision: Decision
    """What it comes to."""
    uri: str
    source: Source

    @property
    def sentences(self) -> list[str]:
        """The verdict."""
        return verdict.sentences(self.decision)

    @property
    def link(self) -> str:
        """Its page in MLflow; on disk where it was not logged."""
        return logged(self.source, self.uri, self.page)


def write_report(
    source: str = LATEST, out: str | Path | None = None, uri: str | None = None, task: str | None = None
) -> Written:
    """Write the report of a sweep or experiment; a sweep's also goes to its MLflow run, with places, means and verdict
    (`arrange.decided`). Needs no flow.

    Args:
        source: a sweep's name or execution, `latest` (the sweep that ended last), or an experiment.
        out: its folder. None: `report/` in the sweep's folder, or `$FEDLORA_HOME/reports/EXPERIMENT`.
        uri: the tracking store. None: as everywhere.
        task: the runs of it alone, where an experiment holds several.

    Raises:
        TrackingError: the store does not answer, or there is no such sweep or experiment.
        FedloraError: no run has finished, or no one score compares those that have.
        RunFolderError: the folder cannot be written.
    """
    resolved = store.resolve_uri(uri)
    found = compare.find(source, resolved)
    comparison = compare.gather(found, resolved, task)
    folder = Path(out).expanduser().absolute() if out else default_folder(found, task)
    decided = decide(comparison)
    page = report.write(comparison, folder, decided)
    log(found, resolved, [page, folder / report.VERDICT, *(folder / f"{name}.csv" for name in report.TABLES)])
    if found.parent is not None:
        parent = Parent(resolved, found.experiment, found.parent.info.run_id)
        arrange.decided(parent, found.instance, comparison, decided)
    return Written(page, comparison, decided, resolved, found)


def log(source: Source, uri: str, files: Sequence[Path]) -> None:
    """Log files beside a sweep's report in MLflow; an experiment has no run to log to.

    Raises:
        TrackingError: the store does not answer.
    """
    if source.parent is not None:
        with store.errors(uri):
            client = store.client(uri)
            for file in files:
                client.log_artifact(source.parent.info.run_id, str(file), _FOLDER)


def logged(source: Source, uri: str, page: Path) -> str:
    """The address in MLflow of a page that was logged; on disk where it was not."""
    if source.parent is None:
        return page.as_uri()
    artifact = store.artifact_page(source.experiment, source.parent.info.run_id, f"{_FOLDER}/{page.name}")
    return where.mlflow_page(uri, artifact)


def default_folder(source: Source, task: str | None = None) -> Path:
    """Where a report goes unless told otherwise: those of an experiment's tasks beside each other."""
    called = source.instance if task is None or source.parent is not None else f"{source.instance}-{task}"
    name = re.sub(r"[^\w.-]+", "-", called).strip(".-") or "report"
    return home.home() / "reports" / name if source.parent is None else home.sweeps() / name / _FOLDER


@form.left_empty
@flow(name="report", validate_parameters=True)
@refusals.told
def make_report(
    source: str = LATEST,
    out: Annotated[str | None, form.empty("string")] = None,
    task: Annotated[str | None, form.empty("string")] = None,
) -> str:
    """Compare the runs of a sweep or experiment on one HTML page; returns its path.

    Args:
        source: A sweep's name or execution, "latest" (the sweep that ended last), or an MLflow experiment.
        out: Folder for the page and its tables. Empty: the sweep's own folder.
        task: The runs of this task alone, where an experiment holds runs of several.
    """
    written = write_report(source, out, task=task)
    names.replace_generated(f"report {written.source.instance}")
    progress.current().results(written.link, written.page.parent)
    create_markdown_artifact(summary(written), key="report", description=written.comparison.title)
    create_link_artifact(written.link, key="report-page", link_text="report.html", description=written.comparison.title)
    show_answers(written)
    return str(written.page)


def plain(text: str) -> str:
    """Text that Markdown does not read as a table's edge or as HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")


_SIGNS = re.compile(r"([!-/:-@\[-`{-~])")


def literal(text: str) -> str:
    """What somebody, or a model, has written, with nothing in it that Markdown would take for marks or links."""
    return _SIGNS.sub(r"\\\1", text)


def show_answers(written: Written) -> None:
    """Where models wrote, their answers to the same prompts side by side, on the flow run's page."""
    if found := answers.side_by_side(written.comparison, written.decision):
        text = "\n".join(["## What they wrote", "", *(line for each in found for line in _answers(each)), _AFTER])
        create_markdown_artifact(text, key="answers", description=written.comparison.title)


_AFTER = (
    "\nAfter the last round, and before training; in brackets what each scorer gives, bold where the first gives 1."
)


def _answers(found: answers.SideBySide) -> Iterator[str]:
    """Below each prompt what was written, a line each: Prefect's tables do not break lines, so that of long answers the
    first would be seen alone."""
    label = ", ".join(filter(None, (found.condition, f"seed {found.seed}")))
    yield from (f"### {literal(label)}", "")
    _, *titles = found.table.titles
    for prompt, *rest in found.table.rows:
        yield from (f"**{literal(prompt.text)}**", "")
        for title, cell in zip(titles, rest, strict=True):
            text = literal(cell.text)
            yield f"- *{literal(title)}*: " + (f"**{text}**" if cell.strong else text)
        yield ""


def of_condition(label: str, board: Table) -> list[str]:
    """A table in Markdown, below the condition that it is for where there are several."""
    rows = [f"| {' | '.join(plain(cell.text) for cell in row)} |" for row in board.rows]
    head = ["", f"**{plain(label)}**", ""] if label else [""]
    return [*head, f"| {' | '.join(board.titles)} |", "|---" * len(board.titles) + "|", *rows]


def summary(written: Written) -> str:
    """The verdict and the leaderboards in Markdown, with the way to the page."""
    lines = [f"## {plain(written.comparison.title)}", *(f"\n{plain(sentence)}" for sentence in written.sentences)]
    for condition in written.decision.conditions:
        lines += of_condition(condition.label, boards.leaderboard(condition).shown)
    return "\n".join([*lines, "", f"[Report]({written.link}), on disk `{written.page}`"])
