"""What MLflow and Prefect's page get of a run, and when: a score is told at once, and logged while the next round's
clients train."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from prefect import runtime

from fedlora.errors import FedloraError
from fedlora.metrics import RoundRecord
from fedlora.run.play import Observer
from flows.progress import Progress
from mlflow_tracking.tracker import Tracked
from tasks import interruption
from tasks.federated import Run, describe, open_tracking, publish, track
from tasks.pages import RunPage


class Logbook(Observer):
    """The record of one run under way, in MLflow and on Prefect's page; both begin with the first score."""

    def __init__(self, run: Run, name: str, parent: str | None, told: Progress) -> None:
        """Args:
        run: which run.
        name: of the run in MLflow.
        parent: MLflow run id of the sweep that the run belongs to.
        told: hears when MLflow does not answer, and when it does again.
        """
        self._run, self._name, self._parent, self._told = run, name, parent, told
        self._begun_ms = int(time.time() * 1000)
        self._tracked: Tracked | None = None
        self._page: RunPage | None = None
        self._waits: int | None = None

    def round(self, record: RoundRecord) -> None:
        self._waits = record.round

    def clients(self, number: int, done: int, of: int) -> None:
        if not done:
            self.catch_up()

    def trained(self) -> None:
        self.catch_up()

    def failed(self, error: BaseException) -> None:
        """What goes wrong is to be seen in MLflow, too, and a score that somebody has stopped at."""
        if self._tracked is None and (self._waits is not None or not interruption.is_one(error)):
            with suppress(FedloraError):
                self._opening().wait()

    def catch_up(self) -> None:
        """Log the round that waits, if one does.

        Raises:
            TrackingError: the store does not answer, and has no run yet that could wait for it.
        """
        if self._waits is None:
            return
        tracked, waits = track.submit(self._run, self._waits, self.tracked).result()
        self._took(tracked, waits)
        self.page.update(self._waits)
        self._waits = None

    def deliver(self) -> None:
        """Write what the finished run leaves, log it, and close the record."""
        note = self.page.note()
        publish.submit(self._run, self.tracked, note).result()
        self.page.summarise(note)
        self._told.results(self.page.address, self._run.folder.path)

    @property
    def tracked(self) -> Tracked:
        """The run in MLflow, opened where it is not yet.

        Raises:
            TrackingError: it cannot be.
        """
        if self._tracked is None:
            self._took(*describe.submit(self._run, self._opening().result()).result())
        assert self._tracked
        return self._tracked

    @property
    def page(self) -> RunPage:
        """Of Prefect."""
        if self._page is None:
            self._page = RunPage(self._run.folder.config, self.tracked, self._run.folder)
        return self._page

    def _opening(self) -> Any:
        return open_tracking.submit(self._run, self._name, self._begun_ms, self._parent, _prefect_tags())

    def _took(self, tracked: Tracked, waits: str) -> None:
        self._tracked = tracked
        self._told.delivery(waits)


def _prefect_tags() -> dict[str, str]:
    tags = {"prefect.flow_run_id": str(runtime.flow_run.id or ""), "prefect.flow_run": str(runtime.flow_run.name or "")}
    return {name: value for name, value in tags.items() if value}
