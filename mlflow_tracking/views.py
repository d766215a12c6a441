"""How a sweep opens in MLflow: a view saved in its experiment, with every run of it visible, accuracy and ρ first.

Without one MLflow shows ten runs, and its sections by name: R, P, Q and bytes before accuracy. A saved view is a tag of
the experiment that MLflow's page reads when an address names it (`viewStateShareKey`), and lists under *Views*. The
metrics keep their names and their own sections; only those of `FIRST` move to the top.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedlora import metrics
from mlflow_tracking import store

if TYPE_CHECKING:
    from mlflow import MlflowClient

PLACE = "fedlora.place"
"""Tag of a run by which a view is sorted: condition, place of the setting in it, seed; set when a sweep ends."""
FIRST = "accuracy and ρ"
"""The section at the top."""

_TAG = "mlflow.sharedViewState."
_SECTIONS = (FIRST, "global", "rho", "final")
"""In this order; MLflow adds those of the other metrics below."""
_SHOWN = (metrics.FINAL_ACCURACY, f"{metrics.FINAL}rho", f"{metrics.FINAL}bytes")
"""Results beside the runs' names where they are listed as a table."""


def save(client: MlflowClient, experiment: str, parent: str, name: str, varied: Sequence[str] = ()) -> None:
    """Save the view of a sweep's runs in their experiment, or renew it.

    Args:
        client: of the store.
        experiment: its id.
        parent: MLflow run id of the sweep.
        name: what the view is called in MLflow's list.
        varied: the settings (dotted keys) that differ between runs: columns of the table.
    """
    now = int(time.time() * 1000)
    packed = base64.b64encode(zlib.compress(json.dumps(_state(parent, varied)).encode())).decode()
    view = {"name": name, "createdAt": now, "updatedAt": now, "state": f"deflate;{packed}"}
    client.set_experiment_tag(experiment, f"{_TAG}{parent}", json.dumps(view, ensure_ascii=False))


def page(uri: str, experiment: str, run: str) -> str:
    """The page of a sweep's runs, below a server's address: its view, or a filtered list where it has none (a sweep of
    an earlier version, or a view that somebody deleted).

    Raises:
        TrackingError: the store does not answer.
    """
    with store.errors(uri):
        tags = store.client(uri).get_experiment(experiment).tags
    return store.view_page(experiment, run) if f"{_TAG}{run}" in tags else store.sweep_page(experiment, run)


def _state(parent: str, varied: Sequence[str]) -> dict[str, Any]:
    """What MLflow's page keeps of a view."""
    columns = [f"params.`{key}`" for key in varied if key != "strategy"]  # with which a run's name begins
    return {
        "searchFilter": store.children_of(parent),
        "orderByKey": f"tags.`{PLACE}`",  # not the date, by which runs are folded under their parent
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,  # or sections are sorted by name again
        "compareRunSections": [_section(name) for name in _SECTIONS],
        "compareRunCharts": [
            _chart("LINE", metrics.GLOBAL_ACCURACY),
            _chart("LINE", metrics.RHO_MODEL),
            # As bars: of one point MLflow would draw a line.
            _chart("BAR", metrics.FINAL_ACCURACY, isGenerated=False, runsCountToCompare=100),
        ],
        "selectedColumns": [*columns, *(f"metrics.`{name}`" for name in _SHOWN)],
    }


def _section(name: str) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": True, "isReordered": True, "deleted": False, "isGenerated": True}


def _chart(kind: str, metric: str, **changes: Any) -> dict[str, Any]:
    """A chart of the first section."""
    shared = {"uuid": metric, "type": kind, "metricSectionId": FIRST, "metricKey": metric, "displayName": metric}
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
