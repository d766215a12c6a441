"""Which setting of a sweep did best, and whether it is better than another one beyond noise."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from fedlora import objective
from fedlora.errors import FedloraError, counted
from fedlora.metrics import FINAL
from fedlora.report import roles
from fedlora.strategies import registry
from mlflow_tracking import judged, store

LEVEL = 0.05
"""How likely a promotion may be where there is no difference (one-sided)."""

_DATA = "data.digest"


@dataclass(frozen=True)
class Score:
    """What one seed reached, and the digest of the data that it was trained and tested on."""

    seed: int
    value: float
    data: str


@dataclass(frozen=True)
class Entrant:
    """A finished federated run: its settings by dotted key, its score, and on how many examples it was tested."""

    run: str
    experiment: str
    strategy: str
    settings: Mapping[str, Any]
    score: Score
    examples: int
    task: str
    criterion: objective.Score
    """The score that decides."""
    partition: str = ""

    @property
    def label(self) -> str:
        """The strategy and the other settings, without the seed."""
        others = (f"{key}={value}" for key, value in self.settings.items() if key not in ("seed", "strategy"))
        return " ".join([self.strategy, *others])


@dataclass(frozen=True)
class Candidate:
    """One setting of a sweep: its scores by seed, and the run of it whose adapter stands for all."""

    run: str
    experiment: str
    sweep: str
    strategy: str
    label: str
    scores: tuple[Score, ...]
    examples: int
    task: str
    criterion: objective.Score
    """The score that decides."""
    partition: str = ""
    condition: str = ""
    """Under which it was compared, like `alpha=0.1`; empty where the sweep has only one."""

    def judged_like(self, other: Candidate) -> bool:
        """Whether both learned the same, and are judged by the same score."""
        return (self.task, self.criterion.name) == (other.task, other.criterion.name)

    def on(self, data: Set[str]) -> list[float]:
        """The scores that were measured on some of these data."""
        return [score.value for score in self.scores if score.data in data]

    @property
    def data(self) -> frozenset[str]:
        """The digests of the data it was tested on: one, unless the seed draws the test set."""
        return frozenset(score.data for score in self.scores)

    @property
    def mean(self) -> float:
        """Over seeds."""
        return _mean(self.on(self.data))

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds, where there are several."""
        return statistics.stdev(self.on(self.data)) if len(self.scores) > 1 else None

    @property
    def reached(self) -> str:
        """Its score in words."""
        if self.spread is None:
            return f"{self.mean:.4f}, one seed" if self.scores else f"no {self.criterion.title}"
        return f"{self.mean:.4f} ± {self.spread:.4f}, {len(self.scores)} seeds"

    def __str__(self) -> str:
        return f"{self.label} ({self.reached})"


@dataclass(frozen=True)
class Comparison:
    """A difference of mean scores, whether ours is better beyond noise, and how that was judged."""

    difference: float
    better: bool
    how: str


def entrants(uri: str, cells: Mapping[str, Mapping[str, Any]]) -> list[Entrant]:
    """The runs that left one federated adapter and were scored.

    Left out: controls (what they reach is not to be had by federation, or shares nothing) and strategies whose clients
    keep adapters of their own.

    Raises:
        TrackingError: the store does not answer, or a run is not in it.
    """
    with store.errors(uri):
        client = store.client(uri)
        found = [entrant_of(client.get_run(run), settings) for run, settings in cells.items()]
    return [entrant for entrant in found if entrant and may_compete(entrant.strategy)]


def by_condition(found: Iterable[Entrant], world: Sequence[str]) -> dict[str, list[Entrant]]:
    """Entrants by what the world was for them, in words like `alpha=0.1`; all under an empty one where `world` (the
    keys that tell conditions apart) is."""
    groups: dict[str, list[Entrant]] = {}
    for entrant in found:
        words = roles.shortly({key: entrant.settings[key] for key in world})
        groups.setdefault(words, []).append(entrant)
    return groups


def best(found: Iterable[Entrant], sweep: str) -> Candidate:
    """The setting (everything but the seed) with the best mean score, and its run with the best score.

    Settings of which fewer seeds finished than of others do not compete: their means would be of other runs.

    Raises:
        FedloraError: no run competes, or they were not tested on the same data.
    """
    groups: dict[str, list[Entrant]] = {}
    for entrant in found:
        groups.setdefault(entrant.label, []).append(entrant)
    if not groups:
        raise FedloraError(f"sweep {sweep} left no federated adapter (controls and personal adapters do not count)")
    most = max(map(len, groups.values()))
    settings = [as_candidate(group, sweep) for group in groups.values() if len(group) == most]
    if len({setting.data for setting in settings}) > 1:
        raise FedloraError(f"the runs of sweep {sweep} had different data or partitions, so none of them is the best")
    return max(settings, key=lambda setting: setting.criterion.sign * setting.mean)


def judge(candidate: Candidate, standing: Candidate) -> Comparison:
    """Whether a candidate is better than another; only scores on data that both were tested on count.

    The best of several settings is flattered by chance; but so was the champion when it was chosen, so no correction.
    """
    shared = candidate.data & standing.data
    examples = candidate.examples, standing.examples
    return compare(candidate.on(shared), standing.on(shared), examples, candidate.criterion)


def compare(
    ours: Sequence[float], theirs: Sequence[float], examples: tuple[int, int], criterion: objective.Score
) -> Comparison:
    """Whether our mean score is better than theirs beyond noise, at `LEVEL`, one-sided.

    With two or more seeds on both sides by Welch's t-test over seeds. Otherwise, and where seeds make no difference, by
    the binomial standard error of both where the score is a share of so many `examples`: it ignores that both were
    judged on the same ones, which makes it cautious, and knows nothing of the spread between seeds. Of another score
    one value does not tell its error, so that nothing is better by it.
    """
    difference = _mean(ours) - _mean(theirs)
    if min(len(ours), len(theirs)) > 1 and (statistics.stdev(ours) or statistics.stdev(theirs)):
        from scipy import stats  # type: ignore[import-untyped,unused-ignore]

        side = "greater" if criterion.higher_is_better else "less"
        p = float(stats.ttest_ind_from_stats(*_summary(ours), *_summary(theirs), False, side).pvalue)
        return Comparison(difference, p < LEVEL, f"Welch's t-test over seeds: p = {p:.2g}, below {LEVEL:g} needed")
    if not criterion.proportion:
        how = f"how much of that is chance, one {criterion.title} cannot tell: two seeds of each that differ are needed"
        return Comparison(difference, False, how)
    squares = (mean * (1 - mean) / n for mean, n in zip((_mean(ours), _mean(theirs)), examples, strict=True))
    margin = statistics.NormalDist().inv_cdf(1 - LEVEL) * math.sqrt(sum(squares))
    how = f"up to {margin:.4f} may be chance on {counted(examples[0], 'test example')}"
    return Comparison(difference, criterion.sign * difference > margin, how)


def entrant_of(run: Any, settings: Mapping[str, Any]) -> Entrant | None:
    """A run of MLflow as it competes; None where it has no score or says not what it was tested on."""
    metrics, tags = run.data.metrics, run.data.tags
    datasets = run.inputs.dataset_inputs if run.inputs else []
    by = judged.of(run)
    if by is None or f"{FINAL}{by.criterion.name}" not in metrics or _DATA not in tags or not datasets:
        return None
    examples = json.loads(datasets[0].dataset.profile)["examples"]["test"]
    # Of another partition of the same data an adapter may be better because the task was easier.
    tested = " ".join(filter(None, (tags[_DATA], tags.get("partition.hash"))))
    score = Score(int(run.data.params["seed"]), float(metrics[f"{FINAL}{by.criterion.name}"]), tested)
    found = run.info.run_id, str(run.info.experiment_id), tags["strategy"]
    judged_by = by.task, by.criterion
    return Entrant(*found, dict(settings), score, int(examples), *judged_by, tags.get("partition.hash", ""))


def may_compete(strategy: str) -> bool:
    """Whether a strategy leaves one adapter that federation made: no control, nothing personal."""
    from fedlora.strategies.base import Family

    found = registry.find(strategy)
    return not (found.traits.personal or found.traits.pools_data or found.traits.family is Family.CONTROL)


def as_candidate(group: Sequence[Entrant], sweep: str) -> Candidate:
    """Runs of one setting as one, which the run with the best score stands for."""
    ordered = sorted(group, key=lambda entrant: entrant.score.seed)
    top = max(ordered, key=lambda entrant: entrant.criterion.sign * entrant.score.value)
    scores = tuple(entrant.score for entrant in ordered)
    about = top.examples, top.task, top.criterion, top.partition
    return Candidate(top.run, top.experiment, sweep, top.strategy, top.label, scores, *about)


def _summary(values: Sequence[float]) -> tuple[float, float, int]:
    return _mean(values), statistics.stdev(values), len(values)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan
