"""What came of a sweep, written to its runs and to its own run in MLflow: places, means by round, settings, verdict."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlora import metrics
from fedlora.objective import Score
from fedlora.report import verdict
from fedlora.report.decision import Condition, Decision, Standing
from fedlora.report.frames import Comparison, plain
from fedlora.report.roles import last_parts
from mlflow_tracking import store, views
from mlflow_tracking.parents import Parent

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

VERDICT = "verdict"
"""Tag of a sweep's run: the verdict in words."""
CHOICE = "choice/"
"""What the names of a sweep's own metrics begin with."""

_AT_ONCE = 1000
"""Metrics that MLflow takes in a request."""
_LONGEST = 250
"""Letters of a metric's name."""
_BETWEEN = ", "
"""Stands between the values of a parameter."""


def begun(
    parent: Parent, title: str, criterion: Score, fixed: Mapping[str, Any], swept: Mapping[str, Sequence[Any]]
) -> None:
    """Write to a sweep's run what it is, and save the view in which its page opens.

    Args:
        parent: the sweep's run.
        title: what the view is called.
        criterion: the score that decides.
        fixed: settings of all runs, by dotted key.
        swept: by dotted key, the values of a setting that varies.

    Raises:
        TrackingError: the store does not answer.
    """
    settings = {**{key: [value] for key, value in fixed.items()}, **swept}
    told = {key: [_text(value) for value in values] for key, values in settings.items()}
    with store.errors(parent.uri):
        client = store.client(parent.uri)
        _log_settings(client, parent, told)
        views.save(client, parent.experiment, parent.run, title, criterion, list(swept))


def decided(parent: Parent, title: str, comparison: Comparison, decision: Decision) -> None:
    """Write what came of a sweep: each run's place, by which the view is sorted; on the sweep's run the means over
    seeds of score and ρ by round, a metric per condition and choice, and the verdict. Again it changes nothing.

    Args:
        parent: the sweep's run.
        title: what its view is called.
        comparison: its finished runs.
        decision: what they come to.

    Raises:
        TrackingError: the store does not answer.
    """
    with store.errors(parent.uri):
        client = store.client(parent.uri)
        for run, place in places(decision).items():
            client.set_tag(run, views.PLACE, place)
        points = list(_means(comparison, decision))
        for start in range(0, len(points), _AT_ONCE):
            client.log_batch(parent.run, metrics=points[start : start + _AT_ONCE])
        client.set_tag(parent.run, VERDICT, " ".join(verdict.sentences(decision)))
        varied = [*decision.choices, *decision.world, "seed"]
        views.save(client, parent.experiment, parent.run, title, decision.criterion, varied)


def places(decision: Decision) -> dict[str, str]:
    """By run id, what sorts runs as text: condition, place of the setting in it (controls last), seed."""
    return {
        run: f"{number:03}-{place:03}-{position:03}"
        for number, condition in enumerate(decision.conditions, 1)
        for place, standing in enumerate(_all(condition), 1)
        for position, (_, run) in enumerate(sorted(standing.setting.seeds.items()))
    }


def _all(condition: Condition) -> list[Standing]:
    return [*condition.standings, *condition.controls]


def _means(comparison: Comparison, decision: Decision) -> Iterator[Metric]:
    """Means over seeds by round. Their time is the start of the latest run: the same whenever they are logged again,
    later where a seed was added, so that the new mean is the one that counts."""
    from mlflow.entities import Metric

    score = comparison.criterion.name
    means = {score: f"{metrics.GLOBAL}{score}", "rho": metrics.RHO_MODEL}
    started = comparison.runs.set_index("run_id")["started"]
    for condition in decision.conditions:
        for standing in _all(condition):
            own = list(standing.setting.seeds.values())
            stamp = int(started[own].max().timestamp() * 1000)
            by_round = comparison.rounds[comparison.rounds["run_id"].isin(own)].groupby("round")
            for measure, metric in means.items():
                if metric in comparison.rounds:
                    name = _name(measure, condition, standing, decision)
                    for number, mean in by_round[metric].mean().dropna().items():
                        yield Metric(name, float(mean), stamp, int(str(number)))


def _name(measure: str, condition: Condition, standing: Standing, decision: Decision) -> str:
    """`choice/accuracy at alpha 0.1/svd rank 4`: a section of charts per condition, in the signs that MLflow allows."""
    world = _words(condition.values)
    chosen = _words({key: standing.setting.values[key] for key in decision.choices})
    return f"{CHOICE}{measure}{f' at {world}' if world else ''}/{chosen}"[:_LONGEST]


def _words(values: Mapping[str, Any]) -> str:
    names = last_parts(values)
    words = (plain(value) if key == "strategy" else f"{names[key]} {plain(value)}" for key, value in values.items())
    return " ".join(re.sub(r"[^\w.: -]+", " ", " ".join(words)).split())


def _text(value: Any) -> str:
    """A value without the sign that stands between values."""
    plain_value = isinstance(value, str | int | float) and not isinstance(value, bool)
    return (plain(value) if plain_value else json.dumps(value, default=str)).replace(_BETWEEN, ",")


def _log_settings(client: MlflowClient, parent: Parent, told: Mapping[str, Sequence[str]]) -> None:
    """As parameters, which MLflow never changes: what was added to a sweep later stands under `KEY.added`."""
    from mlflow.entities import Param

    known = client.get_run(parent.run).data.params
    new = []
    for key, values in told.items():
        name, before = key, set()
        while name in known:
            before |= set(known[name].split(_BETWEEN))
            name += ".added"
        if rest := [value for value in dict.fromkeys(values) if value not in before]:
            new.append(Param(name, _BETWEEN.join(rest)))
    if new:
        client.log_batch(parent.run, params=new)
