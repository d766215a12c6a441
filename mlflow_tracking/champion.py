"""The best adapter of a sweep as a version of a registered model; the alias `champion` moves only beyond noise.

    for decision in champion.after_sweep(parent.uri, sweep.name, {run_id: cell.settings, ...}, sweep.world):
        print(decision.reason)

A sweep over several conditions (ways of dealing, data) has a registered model for each: adapters for different
tasks are no versions of one another. The champion before becomes `challenger`. An adapter that is not better leaves
nothing in the registry, and whatever is decided again for the same runs changes nothing.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.errors import FedloraError, TrackingError, counted
from fedlora.report import wording
from fedlora.strategies import registry
from mlflow_tracking import candidates, judged, store
from mlflow_tracking.candidates import Candidate, Entrant, Score, judge

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
_SETTING, _EXAMPLES, _SEEDS, _DATA = "setting", "test.examples", "seeds", "data.digest"
_TASK, _SCORE = "task", "score"
"""Tags of a version that people read and the next comparison, too: what holds of every seed stands once, else one
after the other."""
_CANDIDATE = "fedlora.candidate"
"""The same in one tag, as JSON: on versions that were registered before."""
_BETWEEN = ", "
_ACCURACY = "accuracy"
"""The score of versions that name none."""


@dataclass(frozen=True)
class Decision:
    """What came of a sweep's best adapter; `reason` is one sentence with numbers.

    `version` is that adapter's version of the registered model `model`, None where it is not registered.
    """

    model: str
    version: int | None
    promoted: bool
    reason: str

    @property
    def page(self) -> str:
        """The page of the registered model, below a server's address."""
        return store.model_page(self.model)


def after_sweep(
    uri: str, sweep: str, cells: Mapping[str, Mapping[str, Any]], world: Sequence[str] = ()
) -> list[Decision]:
    """Choose the best adapter of each condition of a sweep and make it champion if it beats the one that is; raises
    nothing, for a registry that fails must not lose the sweep.

    Args:
        uri: the tracking store.
        sweep: the sweep's name.
        cells: the settings (dotted keys, the seed among them) by MLflow run id, of the runs that finished.
        world: the keys that tell its conditions apart.
    """
    try:
        found = candidates.by_condition(candidates.entrants(uri, cells), world)
    except FedloraError as error:
        return [_none(model_name(sweep), error)]
    return [_of_condition(uri, sweep, condition, entrants) for condition, entrants in (found or {"": []}).items()]


def model_name(sweep: str, condition: str = "", task: str = judged.USUAL) -> str:
    """What the registered model of a sweep is called, or that of one of its conditions: `fedlora-demo-alpha-0.1`, of
    another task than classification `fedlora-demo-generation-alpha-0.1`."""
    named = [] if task == judged.USUAL else [task]
    return "-".join(["fedlora", sweep, *named, *re.findall(r"[\w.]+", condition)])


def _of_condition(uri: str, sweep: str, condition: str, found: Sequence[Entrant]) -> Decision:
    model = model_name(sweep, condition, *{entrant.task for entrant in found})
    try:
        return consider(uri, model, replace(candidates.best(found, sweep), condition=condition))
    except FedloraError as error:
        return _none(model, error)


def _none(model: str, error: FedloraError) -> Decision:
    return Decision(model, None, False, f"No champion was chosen: {error}")


def consider(uri: str, model: str, candidate: Candidate) -> Decision:
    """Register the candidate and make it champion if there is none, or if it is better beyond noise.

    Where nothing was tested on the same data as the champion, a person must decide: the candidate is registered without
    an alias, if it beats whatever was registered for its data before.

    Raises:
        TrackingError: the store does not answer, or does not hold the candidate's adapter.
    """
    with store.errors(uri):
        return _Registry(store.client(uri), model).consider(candidate)


def load(model: str, alias: str = CHAMPION, uri: str | None = None) -> tuple[Any, Any, list[str]]:
    """The model with a registered adapter on it, its tokenizer and the names of its labels, ready for inference.

    Args:
        model: name of the registered model, such as `fedlora-demo`.
        alias: `champion`, `challenger`, or one of your own.
        uri: the tracking store; that of `store.resolve_uri` if not given.

    Raises:
        TrackingError: the store does not answer, or has no such model or alias.
        AdapterError: what is registered was not written by fedlora.
        ModelError: the base model cannot be loaded.
    """
    import fedlora

    with tempfile.TemporaryDirectory(prefix="fedlora-") as folder:
        return fedlora.load_adapter(download(model, folder, alias, uri))


def download(model: str, folder: str | Path, alias: str = CHAMPION, uri: str | None = None) -> Path:
    """Copy a registered adapter (a PEFT folder) into `folder`; what `models:/MODEL@ALIAS` names, of any store.

    Raises:
        TrackingError: the store does not answer, or has no such model or alias.
    """
    from mlflow import artifacts

    where = store.resolve_uri(uri)
    store.check(where)
    with store.errors(where):
        client = store.client(where)
        aliases = _aliases(client, model)
        if aliases is None:
            known = ", ".join(sorted(found.name for found in client.search_registered_models())) or "none"
            raise TrackingError(f"no registered model '{model}' in {where}; there: {known}")
        if alias not in aliases:
            known = ", ".join(sorted(aliases)) or "none"
            raise TrackingError(f"registered model '{model}' has no alias '{alias}'; it has: {known}")
        # By its source, for `models:/` is looked up in MLflow's global registry whatever the client's is.
        source = client.get_model_version_download_uri(model, aliases[alias])
        return Path(artifacts.download_artifacts(source, dst_path=str(folder), tracking_uri=where))


class _Registry:
    """The versions of one registered model, and the moving of its aliases. Nothing is kept between calls."""

    def __init__(self, client: MlflowClient, model: str) -> None:
        self.client, self.model = client, model

    def consider(self, candidate: Candidate) -> Decision:
        current = self._champion()
        if current is None:
            version = self._register(candidate)
            return self._promote(version, None, f"{candidate} is the first champion of {self.model}, version {version}")
        standing, version = self._standing(current, candidate), int(current.version)
        if current.run_id == candidate.run:
            self._learn_scores(current, standing, candidate)
            return self._decide(version, f"{candidate} is the champion of {self.model} already, version {version}")
        if not candidate.judged_like(standing):
            how = f"that is judged by its {standing.criterion.title}, this by its {candidate.criterion.title}"
            return self._undecided(candidate, f"{self.model}'s champion {standing}, version {version}", how)
        if not candidate.data & standing.data:
            how = "they had different data or partitions"
            return self._undecided(candidate, f"{self.model}'s champion {standing}, version {version}", how)
        judged = judge(candidate, standing)
        against = f"{self.model}'s champion {standing}, version {version}: {judged.difference:+.4f}; {judged.how}"
        if not judged.better:
            return self._decide(self._version_of(candidate), f"{candidate} does not replace {against}")
        new = self._register(candidate)
        return self._promote(new, version, f"{candidate}, version {new}, replaces {against}")

    def _undecided(self, candidate: Candidate, champion: str, why: str) -> Decision:
        """Tests that differ tell no champion, and nightly runs on other data must not pile up versions either."""
        said = f"{candidate} cannot be compared with {champion}: {why}"
        known = self._version_of(candidate)
        if known:
            return self._decide(known, f"{said}; it is version {known} already")
        others = (self._standing(version, candidate) for version in self._versions())
        rival = next((each for each in others if each.data & candidate.data and each.judged_like(candidate)), None)
        if rival and not judge(candidate, rival).better:
            return self._decide(None, f"{said}; not registered, for it does not beat {rival} on its data")
        new = self._register(candidate)
        return self._decide(new, f"{said}; registered as version {new}, for you to give it the alias {CHAMPION}")

    def _decide(self, version: int | None, reason: str, promoted: bool = False) -> Decision:
        return Decision(self.model, version, promoted, f"{reason}.")

    def _promote(self, version: int, before: int | None, reason: str) -> Decision:
        """The challenger's alias is set first: if this stops between the two, the next try finds the same champion."""
        if before is not None:
            self.client.set_registered_model_alias(self.model, CHALLENGER, str(before))
            reason += f"; version {before} is kept as {CHALLENGER}"
        self.client.set_registered_model_alias(self.model, CHAMPION, str(version))
        return self._decide(version, reason, promoted=True)

    def _champion(self) -> ModelVersion | None:
        aliases = _aliases(self.client, self.model) or {}
        return self.client.get_model_version(self.model, aliases[CHAMPION]) if CHAMPION in aliases else None

    def _versions(self) -> list[ModelVersion]:
        """Newest first."""
        found = self.client.search_model_versions(f"name = '{self.model}'")
        return sorted(found, key=lambda version: int(version.version), reverse=True)

    def _version_of(self, candidate: Candidate) -> int | None:
        found = (int(version.version) for version in self._versions() if version.run_id == candidate.run)
        return next(found, None)

    def _register(self, candidate: Candidate) -> int:
        """The version of the candidate's adapter, made unless it is there."""
        if known := self._version_of(candidate):
            return known
        files = [file.path for file in self.client.list_artifacts(candidate.run, "adapter")]
        if "adapter/adapter_config.json" not in files:
            raise TrackingError(
                f"MLflow run {candidate.run} has no adapter among the artifacts that are reached from here"
            )
        self._create_model(candidate)
        source = f"{self.client.get_run(candidate.run).info.artifact_uri}/adapter"
        made = self.client.create_model_version(
            self.model,
            source,
            candidate.run,
            tags=_tags(candidate),
            description=_description(candidate),
            await_creation_for=0,  # nothing is copied
        )
        return int(made.version)

    def _create_model(self, candidate: Candidate) -> None:
        from mlflow.exceptions import MlflowException

        where = f" at {candidate.condition}" if candidate.condition else ""
        note = (
            f"The best federated adapters of sweep `{candidate.sweep}`{where}: `models:/{self.model}@{CHAMPION}` is "
            f"the best so far, `{CHALLENGER}` the one before it. The aliases move when another is better beyond noise."
        )
        tags = {"sweep": candidate.sweep} | ({"condition": candidate.condition} if where else {})
        try:
            self.client.create_registered_model(self.model, tags=tags, description=note)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _standing(self, version: ModelVersion, rival: Candidate) -> Candidate:
        """A version as it can be compared; without scores where neither it nor its run tells them."""
        tags, run = version.tags, version.run_id or ""
        task, by = tags.get(_TASK, judged.USUAL), rival.criterion
        if (name := tags.get(_SCORE, _ACCURACY)) != by.name:
            by = replace(by, name=name, title=name)
        if _CANDIDATE in tags:
            label, examples, scores = json.loads(tags[_CANDIDATE])
            return Candidate(run, "", "", "", label, tuple(Score(*score) for score in scores), examples, task, by)
        if _each(name) in tags:
            return Candidate(run, "", "", "", tags[_SETTING], _scores(tags, name), int(tags[_EXAMPLES]), task, by)
        found = self._registered_by_hand(run)
        if found:
            return candidates.as_candidate([found], "")
        return Candidate(run, "", "", "", "of unknown origin", (), 0, rival.task, rival.criterion)

    def _registered_by_hand(self, run: str) -> Entrant | None:
        from mlflow.exceptions import MlflowException

        try:
            return candidates.entrant_of(self.client.get_run(run), {}) if run else None
        except MlflowException:  # deleted, or in another store
            return None

    def _learn_scores(self, current: ModelVersion, standing: Candidate, candidate: Candidate) -> None:
        """A sweep that was continued knows more seeds of the setting than when it was registered."""
        if len(candidate.scores) > len(standing.scores):
            for key, value in _tags(candidate).items():
                self.client.set_model_version_tag(self.model, current.version, key, value)
            self.client.update_model_version(self.model, current.version, _description(candidate))


def _tags(candidate: Candidate) -> dict[str, str]:
    """What a version says of itself, to people and to the next comparison."""
    scores, name = candidate.scores, candidate.criterion.name
    data = [score.data for score in scores]
    tags = {
        "sweep": candidate.sweep,
        "strategy": candidate.strategy,
        _SETTING: candidate.label,
        name: f"{candidate.mean:.4f}",
        _SEEDS: _BETWEEN.join(str(score.seed) for score in scores),
        _each(name): _BETWEEN.join(str(score.value) for score in scores),
        _EXAMPLES: str(candidate.examples),
        "partition.hash": candidate.partition,
        _DATA: _BETWEEN.join(data if len(set(data)) > 1 else data[:1]),
    }
    optional = {"condition": candidate.condition, f"{name}.sd": candidate.spread and f"{candidate.spread:.4f}"}
    if (candidate.task, name) != (judged.USUAL, _ACCURACY):
        optional |= {_TASK: candidate.task, _SCORE: name}
    return tags | {name: text for name, text in optional.items() if text}


def _each(score: str) -> str:
    """The tag with a score by seed."""
    return "accuracies" if score == _ACCURACY else f"{score}.each"


def _scores(tags: Mapping[str, str], score: str) -> tuple[Score, ...]:
    """What `_tags` wrote of the seeds."""
    seeds, values, data = (tags[name].split(_BETWEEN) for name in (_SEEDS, _each(score), _DATA))
    data = data * len(seeds) if len(data) == 1 else data
    every = zip(map(int, seeds), map(float, values), data, strict=True)
    return tuple(Score(*each) for each in every)


def _description(candidate: Candidate) -> str:
    """The version in Markdown, its score first (a list shows a few words), with a link to the page of its run."""
    page = store.run_page(candidate.experiment, candidate.run)
    where = f" at {candidate.condition}" if candidate.condition else ""
    lines = [
        f"{wording.title(candidate.criterion)} {candidate.reached}: {candidate.label}, "
        f"the best of sweep `{candidate.sweep}`{where}. The adapter is that of [this run]({page}).",
        "",
        f"| seed | {candidate.criterion.title} on {counted(candidate.examples, 'test example')} |",
        "|---|---|",
        *(f"| {score.seed} | {score.value:.4f} |" for score in candidate.scores),
    ]
    if registry.find(candidate.strategy).traits.changes_base:
        lines += ["", "The base was changed too (`base_delta.safetensors`): load it with `fedlora.load_adapter`."]
    return "\n".join(lines)


def _aliases(client: MlflowClient, model: str) -> dict[str, str] | None:
    """Versions by alias; None where there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(model).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
