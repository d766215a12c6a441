"""How a sweep opens in MLflow: a view saved in its experiment, with every run of it visible, score and ρ first.

Without one MLflow shows ten runs, and its sections by name: R, P, Q and bytes before the score. A saved view is a tag
of the experiment that MLflow's page reads when an address names it (`viewStateShareKey`), and lists under *Views*. The
metrics keep their names and their own sections; only those of `first` move to the top.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedlora import metrics
from fedlora.config import RunConfig
from fedlora.objective import Score
from mlflow_tracking import judged, store
from mlflow_tracking.judged import Judged

if TYPE_CHECKING:
    from mlflow import MlflowClient

PLACE = "fedlora.place"
"""Tag of a run by which a view is sorted: condition, place of the setting in it, seed; set when a sweep ends."""

_TAG = "mlflow.sharedViewState."
_SECTIONS = ("global", "rho", "final")
"""In this order below the first; MLflow adds those of the other metrics below."""
_SHOWN = (f"{metrics.FINAL}rho", f"{metrics.FINAL}bytes")
"""Results beside the runs' names and scores where they are listed as a table."""


def first(criterion: Score) -> str:
    """The section at the top."""
    return f"{criterion.title} and ρ"


def save(
    client: MlflowClient, experiment: str, parent: str, name: str, criterion: Score, varied: Sequence[str] = ()
) -> None:
    """Save the view of a sweep's runs in their experiment, or renew it.

    Args:
        client: of the store.
        experiment: its id.
        parent: MLflow run id of the sweep.
        name: what the view is called in MLflow's list.
        criterion: the score that decides.
        varied: the settings (dotted keys) that differ between runs: columns of the table.
    """
    now = int(time.time() * 1000)
    packed = base64.b64encode(zlib.compress(json.dumps(_state(parent, criterion, varied)).encode())).decode()
    view = {"name": name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    client.set_experiment_tag(experiment, f"{_TAG}{parent}", json.dumps(view, ensure_ascii=False))


def page(uri: str, experiment: str, run: str) -> str:
    """The page of a sweep's runs, below a server's address: its view, or a filtered list where it has none (a sweep of
    an earlier version, or a view that somebody deleted).

    Raises:
        TrackingError: the store does not answer.
    """
    with store.errors(uri):
        client = store.client(uri)
        if f"{_TAG}{run}" in client.get_experiment(experiment).tags:
            return store.view_page(experiment, run)
        known = map(judged.of, client.search_runs([experiment], store.children_of(run), max_results=1))
    by = next(filter(None, known), None) or Judged.by(RunConfig())
    return store.sweep_page(experiment, run, by.criterion)


def _state(parent: str, criterion: Score, varied: Sequence[str]) -> dict[str, Any]:
    """What MLflow's page keeps of a view."""
    top = first(criterion)
    final = f"{metrics.FINAL}{criterion.name}"
    columns = [f"params.`{key}`" for key in varied if key != "strategy"]  # with which a run's name begins
    return {
        "searchFilter": store.children_of(parent),
        "orderByKey": f"tags.`{PLACE}`",  # not the date, by which runs are folded under their parent
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,  # or sections are sorted by name again
        "compareRunSections": [_section(name) for name in (top, *_SECTIONS)],
        "compareRunCharts": [
            _chart("LINE", f"{metrics.GLOBAL}{criterion.name}", top),
            _chart("LINE", metrics.RHO_MODEL, top),
            # As bars: of one point MLflow would draw a line.
            _chart("BAR", final, top, isGenerated=False, runsCountToCompare=100),
        ],
        "selectedColumns": [*columns, *(f"metrics.`{name}`" for name in (final, *_SHOWN))],
    }


def _section(name: str) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": True}


def _chart(kind: str, metric: str, section: str, **changes: Any) -> dict[str, Any]:
    """A chart of a section."""
    shared = {"uuid": metric, "type": kind, "metricSectionId": section, "metricKey": metric, "displayName": metric}
    of_kind = _LINE if kind == "LINE" else {}
    return {**shared, "deleted": False, "isGenerated": True, **of_kind, **changes}


_LINE = {
    "xAxisKey": "step",
    "selectedXAxisMetricKey": "",
    "xAxisScaleType": "linear",
    "scaleType": "linear",
    "range": {},
    "yAxisKey": "metric",
    "yAxisExpressions": [],
    "lineSmoothness": 0,
    "ignoreOutliers": False,
    "useGlobalXaxisKey": True,
    "useGlobalLineSmoothing": True,
}
"""What a line chart must say of itself, or MLflow's page fails."""
