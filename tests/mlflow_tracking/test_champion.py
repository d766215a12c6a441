"""Champions in a real SQLite registry, and through a real MLflow server, with real adapters and made-up accuracies."""

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient, artifacts

import fedlora
from fedlora.errors import ConfigError, TrackingError
from fedlora.objective.classification import ACCURACY
from fedlora.objective.generation import LOSS
from fedlora.run import preflight
from mlflow_tracking import beginning, champion, store, tracker
from mlflow_tracking.candidates import Candidate, Score
from mlflow_tracking.judged import USUAL

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "promote-an-adapter.md"
NAMES = map("fedlora-{}".format, itertools.count())
"""A registered model of its own for each test that wants one."""


@pytest.fixture(scope="module")
def uri(with_databases, tmp_path_factory):
    found = f"sqlite:///{with_databases(tmp_path_factory.mktemp('store'), 'mlflow.db') / 'mlflow.db'}"
    store.experiment_id(store.client(found), found, "fedlora")
    return found


@pytest.fixture(scope="module")
def track(finished, as_new, tmp_path_factory):
    """`track(uri, {"strategy": "svd"})`: that tiny run as a finished run of the store; its id."""

    def tracked(uri, changes=None, accuracy=None):
        run = as_new(finished(changes), tmp_path_factory.mktemp("run") / "run")
        with pytest.MonkeyPatch.context() as environ:
            environ.setenv("MLFLOW_TRACKING_URI", uri)
            begun = tracker.start(run, "a run")
        tracker.finish(run, begun, "## note")
        if accuracy is not None:
            MlflowClient(uri).log_metric(begun.run, "final/accuracy", accuracy, step=3)
        return begun.run

    return tracked


@pytest.fixture(scope="module")
def runs(track, uri):
    """The ids of four runs with adapters."""
    return [track(uri) for _ in range(4)]


@pytest.fixture
def name():
    return next(NAMES)


def candidate(run, *accuracies, data="d1", seeds=None, examples=1000, strategy="svd", task=USUAL, criterion=ACCURACY):
    digests = [data] * len(accuracies) if isinstance(data, str) else data
    scores = map(Score, seeds or range(len(accuracies)), accuracies, digests)
    return Candidate(run, "1", "mine", strategy, strategy, tuple(scores), examples, task, criterion, "p1")


def written(run, *losses, criterion=LOSS, **more):
    """A candidate of another task, on the same data."""
    return candidate(run, *losses, task="generation", criterion=criterion, **more)


def versions(uri, name):
    return {int(v.version): v for v in MlflowClient(uri).search_model_versions(f"name = '{name}'")}


def aliases(uri, name):
    return {alias: int(v) for alias, v in MlflowClient(uri).get_registered_model(name).aliases.items()}


LOW, HIGH = (0.60, 0.62, 0.61), (0.70, 0.72, 0.71)


def test_the_first_becomes_champion_and_says_where_it_comes_from(uri, runs, name):
    found = champion.consider(uri, name, candidate(runs[0], *LOW))
    assert (found.model, found.version, found.promoted) == (name, 1, True)
    assert found.reason == f"svd (0.6100 ± 0.0100, 3 seeds) is the first champion of {name}, version 1."
    version = versions(uri, name)[1]
    assert version.run_id == runs[0]
    shown = {"sweep": "mine", "strategy": "svd", "accuracy": "0.6100", "accuracy.sd": "0.0100", "seeds": "0, 1, 2"}
    shown |= {"test.examples": "1000", "partition.hash": "p1", "data.digest": "d1"}
    assert shown.items() <= version.tags.items()
    assert f"#/experiments/1/runs/{runs[0]}" in version.description
    assert version.description.startswith("Accuracy 0.6100 ± 0.0100, 3 seeds: svd, the best of sweep `mine`.")
    assert not any(value.startswith(("[", "{")) for value in version.tags.values())  # people read them


def test_a_better_one_is_promoted_and_the_champion_is_kept_as_challenger(uri, runs, name):
    for run, accuracies in zip(runs, (LOW, HIGH, [value + 0.2 for value in HIGH]), strict=False):
        found = champion.consider(uri, name, candidate(run, *accuracies))
        assert found.promoted
    assert aliases(uri, name) == {"champion": 3, "challenger": 2}
    assert re.fullmatch(
        rf"svd \(0\.9100 ± 0\.0100, 3 seeds\), version 3, replaces {name}'s champion svd "
        r"\(0\.7100 ± 0\.0100, 3 seeds\), version 2: \+0\.2000; Welch's t-test over seeds: p = \S+, "
        r"below 0\.05 needed; version 2 is kept as challenger\.",
        found.reason,
    )


def test_of_losses_the_lower_one_is_promoted_and_both_say_what_they_are(uri, runs, name):
    champion.consider(uri, name, written(runs[0], *HIGH))
    assert not champion.consider(uri, name, written(runs[1], *[value + 0.2 for value in HIGH])).promoted
    found = champion.consider(uri, name, written(runs[2], *LOW))
    assert found.promoted
    assert f"replaces {name}'s champion svd (0.7100 ± 0.0100, 3 seeds), version 1: -0.1000; Welch" in found.reason
    version = versions(uri, name)[2]
    shown = {
        "task": "generation",
        "score": "loss",
        "loss": "0.6100",
        "loss.sd": "0.0100",
        "loss.each": "0.6, 0.62, 0.61",
    }
    assert shown.items() <= version.tags.items()
    assert not {"accuracy", "accuracies"} & version.tags.keys()
    assert version.description.startswith("Loss 0.6100 ± 0.0100, 3 seeds: svd, the best of sweep `mine`.")
    assert "| seed | loss on 1000 test examples |" in version.description


def test_a_champion_of_one_task_never_beats_one_of_another(uri, runs, name):
    """On the same data, and ahead in either direction."""
    champion.consider(uri, name, candidate(runs[0], *LOW))
    worse, better = ([value + change for value in LOW] for change in (0.3, -0.3))
    for version, run, values in ((2, runs[1], worse), (3, runs[2], better)):
        found = champion.consider(uri, name, written(run, *values))
        assert (found.promoted, found.version) == (False, version)  # nor is it kept out by one of another task
        assert f"cannot be compared with {name}'s champion" in found.reason
        assert "that is judged by its accuracy, this by its loss" in found.reason
    assert aliases(uri, name) == {"champion": 1}
    MlflowClient(uri).set_registered_model_alias(name, "champion", "2")
    back = champion.consider(uri, name, candidate(runs[3], *HIGH))
    assert not back.promoted
    assert "that is judged by its loss, this by its accuracy" in back.reason


def test_neither_does_one_of_the_same_task_that_is_judged_otherwise(uri, runs, name):
    exact = replace(ACCURACY, name="exact", title="exact match")
    champion.consider(uri, name, written(runs[0], *LOW, criterion=exact))
    for values in (HIGH, [value - 0.3 for value in LOW]):
        assert not champion.consider(uri, name, written(runs[1], *values)).promoted


def test_a_registered_model_of_another_task_than_classification_is_called_after_it():
    assert champion.model_name("mine", "alpha=0.1") == "fedlora-mine-alpha-0.1"
    assert champion.model_name("mine", "alpha=0.1", "generation") == "fedlora-mine-generation-alpha-0.1"


@pytest.mark.parametrize("accuracies", [(0.615, 0.625, 0.62), (0.5, 0.5, 0.5), LOW], ids=["noise", "worse", "equal"])
def test_one_that_is_not_better_beyond_noise_leaves_nothing(uri, runs, name, accuracies):
    champion.consider(uri, name, candidate(runs[0], *LOW))
    found = champion.consider(uri, name, candidate(runs[1], *accuracies))
    assert (found.promoted, found.version) == (False, None)
    assert f"does not replace {name}'s champion svd (0.6100 ± 0.0100, 3 seeds), version 1" in found.reason
    assert aliases(uri, name) == {"champion": 1}
    assert versions(uri, name).keys() == {1}


def test_one_seed_is_judged_by_the_size_of_the_test_set(uri, runs, name):
    champion.consider(uri, name, candidate(runs[0], 0.60, examples=200))
    found = champion.consider(uri, name, candidate(runs[1], 0.65, examples=200))
    assert not found.promoted
    assert found.reason.endswith(": +0.0500; up to 0.0795 may be chance on 200 test examples.")
    assert champion.consider(uri, name, candidate(runs[1], 0.69, examples=200)).promoted


def test_scores_on_data_that_only_one_was_tested_on_do_not_count(uri, runs, name):
    """Seed 2 draws other test examples, and the candidate would win by it alone."""
    champion.consider(uri, name, candidate(runs[0], 0.60, 0.62, data=["a", "b"]))
    found = champion.consider(uri, name, candidate(runs[1], 0.60, 0.62, 0.99, data=["a", "b", "c"]))
    assert not found.promoted
    assert ": +0.0000;" in found.reason


def test_another_test_set_is_registered_for_a_person_to_decide_but_not_piled_up(uri, runs, name):
    champion.consider(uri, name, candidate(runs[0], *HIGH))
    other = candidate(runs[1], *LOW, data="d2")
    found = champion.consider(uri, name, other)
    assert (found.version, found.promoted) == (2, False)
    assert (
        "had different data or partitions; registered as version 2, for you to give it the alias champion"
        in found.reason
    )
    assert champion.consider(uri, name, other).version == 2
    assert champion.consider(uri, name, candidate(runs[2], *LOW, data="d2")).version is None
    assert champion.consider(uri, name, candidate(runs[3], *HIGH, data="d2")).version == 3
    assert aliases(uri, name) == {"champion": 1}
    MlflowClient(uri).set_registered_model_alias(name, "champion", "3")
    assert not champion.consider(uri, name, candidate(runs[2], *LOW, data="d2")).promoted


def test_deciding_again_changes_nothing(uri, runs, name):
    first, second = candidate(runs[0], *LOW), candidate(runs[1], *HIGH)
    for each in (first, first, second, second, first):
        last = champion.consider(uri, name, each)
    assert aliases(uri, name) == {"champion": 2, "challenger": 1}
    assert versions(uri, name).keys() == {1, 2}
    assert (last.promoted, last.version) == (False, 1)
    again = champion.consider(uri, name, second)
    assert again.reason == f"svd (0.7100 ± 0.0100, 3 seeds) is the champion of {name} already, version 2."


def test_a_promotion_that_was_interrupted_is_completed_by_the_next_try(uri, runs, name, monkeypatch):
    champion.consider(uri, name, candidate(runs[0], *LOW))
    real = MlflowClient.set_registered_model_alias

    def breaks(client, model, alias, version):
        if alias == "champion":
            raise ConnectionError("gone")
        real(client, model, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", breaks)
    with pytest.raises(TrackingError, match="gone"):
        champion.consider(uri, name, candidate(runs[1], *HIGH))
    monkeypatch.undo()
    assert champion.consider(uri, name, candidate(runs[1], *HIGH)).promoted
    assert aliases(uri, name) == {"champion": 2, "challenger": 1}
    assert versions(uri, name).keys() == {1, 2}


def test_a_champion_learns_the_seeds_that_were_added_to_its_sweep(uri, runs, name):
    champion.consider(uri, name, candidate(runs[0], 0.60))
    champion.consider(uri, name, candidate(runs[0], *LOW))
    champion.consider(uri, name, candidate(runs[0], 0.60))
    assert versions(uri, name)[1].tags["seeds"] == "0, 1, 2"
    assert "Welch" in champion.consider(uri, name, candidate(runs[1], *HIGH)).reason


def test_a_champion_registered_by_hand_is_compared_by_its_run(uri, track, runs, name):
    client = MlflowClient(uri)
    own = track(uri, accuracy=0.5)
    client.create_registered_model(name)
    client.create_model_version(name, f"{client.get_run(own).info.artifact_uri}/adapter", own)
    client.set_registered_model_alias(name, "champion", "1")
    tags = client.get_run(own).data.tags
    data = f"{tags['data.digest']} {tags['partition.hash']}"  # the same task: the same data, dealt the same way
    found = champion.consider(uri, name, candidate(runs[0], 0.9, data=data))
    assert found.promoted
    assert "champion fedit (0.5000, one seed), version 1: +0.4000" in found.reason


def test_a_champion_of_unknown_origin_is_left_to_a_person(uri, runs, name, tmp_path):
    client = MlflowClient(uri)
    client.create_registered_model(name)
    client.create_model_version(name, tmp_path.as_uri())
    client.set_registered_model_alias(name, "champion", "1")
    found = champion.consider(uri, name, candidate(runs[0], *HIGH))
    assert (found.promoted, found.version) == (False, 2)
    assert "champion of unknown origin (no accuracy), version 1" in found.reason


def test_a_sweep_in_the_store_is_read_and_its_best_adapter_promoted(uri, track, name):
    """A control is ahead, and does not count."""
    accuracies = {("fedit", 0): 0.50, ("fedit", 1): 0.52, ("svd", 0): 0.60, ("svd", 1): 0.61, ("oracle", 0): 0.9}
    cells = {}
    for (strategy, seed), accuracy in accuracies.items():
        run = track(uri, {"seed": 1} if seed else {}, accuracy)
        MlflowClient(uri).set_tag(run, "strategy", strategy)
        cells[run] = {"strategy": strategy, "seed": seed}
    (found,) = champion.after_sweep(uri, name.removeprefix("fedlora-"), cells)
    assert found.promoted
    assert found.reason == f"svd (0.6050 ± 0.0071, 2 seeds) is the first champion of {name}, version 1."
    version = versions(uri, name)[1]
    assert cells[version.run_id] == {"strategy": "svd", "seed": 1}
    assert version.tags["test.examples"] == "60"
    assert version.tags["partition.hash"] == MlflowClient(uri).get_run(version.run_id).data.tags["partition.hash"]
    only_controls = {run: cell for run, cell in cells.items() if cell["strategy"] == "oracle"}
    assert "left no federated adapter" in champion.after_sweep(uri, "mine", only_controls)[0].reason


def test_each_condition_of_a_sweep_has_a_champion_of_its_own(uri, track, name):
    """svd is better where labels are skewed, fedit where they are not; neither is judged by the other's task."""
    accuracies = {("svd", 0.1): 0.60, ("fedit", 0.1): 0.50, ("svd", 100): 0.70, ("fedit", 100): 0.90}
    cells = {}
    for (strategy, alpha), accuracy in accuracies.items():
        run = track(uri, accuracy=accuracy)
        for tag, value in (("strategy", strategy), ("partition.hash", f"dealt by {alpha}")):
            MlflowClient(uri).set_tag(run, tag, value)
        cells[run] = {"strategy": strategy, "partition.alpha": alpha, "seed": 0}
    sweep = name.removeprefix("fedlora-")
    found = champion.after_sweep(uri, sweep, cells, ["partition.alpha"])
    assert [(each.model, each.version, each.promoted) for each in found] == [
        (f"{name}-alpha-0.1", 1, True),
        (f"{name}-alpha-100", 1, True),
    ]
    for each, strategy, alpha in zip(found, ("svd", "fedit"), (0.1, 100), strict=True):
        assert aliases(uri, each.model) == {"champion": 1}
        version = versions(uri, each.model)[1]
        assert cells[version.run_id] == {"strategy": strategy, "partition.alpha": alpha, "seed": 0}
        assert version.tags["condition"] == f"alpha={alpha}"
        assert f"the best of sweep `{sweep}` at alpha={alpha}" in version.description
    assert "already" in champion.after_sweep(uri, sweep, cells, ["partition.alpha"])[1].reason


def test_a_champion_that_was_registered_with_its_scores_as_json_is_compared_by_them(uri, runs, name):
    """As versions before were; with a digest of data a seed, and other ones than the tags would say."""
    champion.consider(uri, name, candidate(runs[0], *LOW))
    client = MlflowClient(uri)
    old = ["svd", 1000, [[seed, accuracy, f"d{seed}"] for seed, accuracy in enumerate(HIGH)]]
    client.set_model_version_tag(name, "1", "fedlora.candidate", json.dumps(old))
    found = champion.consider(uri, name, candidate(runs[1], *HIGH, data=["d0", "d1", "d2"]))
    assert f"does not replace {name}'s champion svd (0.7100 ± 0.0100, 3 seeds), version 1: +0.0000" in found.reason


def test_a_registry_that_fails_does_not_lose_the_sweep(uri):
    (found,) = champion.after_sweep(uri, "mine", {"0" * 32: {"strategy": "svd", "seed": 0}})
    assert not found.promoted
    assert re.match(r"No champion was chosen: the tracking store .* Run .* not found", found.reason)


def test_a_run_without_an_adapter_is_named(uri, name):
    client = MlflowClient(uri)
    run = client.create_run(store.experiment_id(client, uri, "fedlora")).info.run_id
    with pytest.raises(TrackingError, match=f"run {run} has no adapter"):
        champion.consider(uri, name, candidate(run, *HIGH))
    assert not versions(uri, name)


def logits(network, tokenizer):
    with torch.no_grad():
        return network(**tokenizer("a small bird of the river", return_tensors="pt")).logits


@pytest.mark.parametrize("changes", [{}, {"strategy": "flora"}], ids=["fedit", "flora"])
def test_the_champion_predicts_as_the_folder_of_its_run(uri, track, finished, name, changes):
    """FLoRA changes the base too."""
    champion.consider(uri, name, candidate(track(uri, changes), *HIGH, **changes))
    network, tokenizer, labels = champion.load(name, uri=uri)
    expected, _, names = fedlora.load_adapter(finished(changes) / "adapter")
    assert labels == names
    assert torch.equal(logits(network, tokenizer), logits(expected, tokenizer))


def test_a_run_may_start_from_the_champion(uri, runs, configure, name):
    champion.consider(uri, name, candidate(runs[0], *LOW))
    asked = configure({"lora.init": f"models:/{name}@champion", "tracking.uri": uri})
    config = beginning.looked_up(asked)
    assert (Path(config.lora.init) / "adapter_model.safetensors").is_file()
    preflight.names(config)
    assert beginning.looked_up(asked).digest() == config.digest() == beginning.looked_up(config).digest()


@pytest.mark.parametrize("reference", ["models:/some", "models:/@champion", "models:/some/3"])
def test_a_reference_of_another_form_is_refused(uri, configure, reference):
    with pytest.raises(ConfigError, match=r"expected models:/NAME@ALIAS"):
        beginning.looked_up(configure({"lora.init": reference, "tracking.uri": uri}))


def test_what_is_not_registered_is_named_with_what_is(uri, runs, name):
    champion.consider(uri, name, candidate(runs[0], *LOW))
    with pytest.raises(TrackingError, match=rf"no registered model 'fedlora-demoo' in sqlite.*there: .*{name}"):
        champion.load("fedlora-demoo", uri=uri)
    with pytest.raises(TrackingError, match=rf"'{name}' has no alias 'challenger'; it has: champion"):
        champion.load(name, "challenger", uri)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An MLflow server that keeps the artifacts itself, as one on another machine does."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "kept")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"}
        )
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                try:
                    store.check(url)
                    break
                except TrackingError:
                    assert process.poll() is None, (folder / "log").read_text()
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.system
def test_over_a_server_and_as_in_the_docs(server, track, finished, monkeypatch):
    run = track(server)
    assert champion.consider(server, "fedlora-demo", candidate(run, *LOW, strategy="fedit")).promoted
    assert versions(server, "fedlora-demo")[1].source.startswith("mlflow-artifacts:")
    expected, tokenizer, _ = fedlora.load_adapter(finished() / "adapter")
    network, *_ = champion.load("fedlora-demo", uri=server)
    assert torch.equal(logits(network, tokenizer), logits(expected, tokenizer))

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    folder = artifacts.download_artifacts("models:/fedlora-demo@champion")
    assert sorted(path.name for path in Path(folder).iterdir()) == sorted(
        path.name for path in (finished() / "adapter").iterdir()
    )
    back, by_mlflow, by_us = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    for code in (by_mlflow, by_us):
        names: dict = {}
        exec(code, names)
        assert torch.equal(logits(names["model"], names["tokenizer"]), logits(expected, tokenizer))
    assert champion.consider(server, "fedlora-demo", candidate(track(server), *HIGH)).promoted
    exec(back, {})
    assert aliases(server, "fedlora-demo")["champion"] == 1
