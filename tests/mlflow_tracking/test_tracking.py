"""A finished run delivered to a real SQLite store: once, in order, whenever the store answers."""

import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from mlflow import MlflowClient

from fedlora.config import addresses
from fedlora.errors import TrackingError
from fedlora.objective.classification import ACCURACY
from fedlora.run import rounds
from mlflow_tracking import history, parents, store, tracker


@pytest.fixture(scope="module")
def uri(with_databases, tmp_path_factory):
    found = f"sqlite:///{with_databases(tmp_path_factory.mktemp('store'), 'mlflow.db') / 'mlflow.db'}"
    store.experiment_id(store.client(found), found, "fedlora")
    return found


@pytest.fixture
def run(finished, as_new, tmp_path, uri, monkeypatch):
    """A copy of a finished two-round run, and a store that it is not in yet."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return as_new(finished(), tmp_path / "run")


def points(uri, tracked, name="global/accuracy"):
    return [(p.step, p.value, p.timestamp) for p in MlflowClient(uri).get_metric_history(tracked.run, name)]


def test_rounds_are_delivered_once_with_the_values_and_times_of_their_records(run, uri):
    tracked = tracker.deliver(run, tracker.start(run, "a run"))
    expected = [(r.round, r.metrics["global/accuracy"], r.timestamp_ms) for r in rounds.records(run)]
    assert points(uri, tracked) == expected
    assert tracker.deliver(run, tracked) == tracked
    again = tracker.deliver(run, replace(tracked, logged=-1))  # as if the note of what was logged had been lost
    assert points(uri, again) == expected


def test_a_round_that_could_not_be_delivered_comes_with_the_next(run, uri, monkeypatch):
    tracked = tracker.start(run, "a run")
    with monkeypatch.context() as broken:
        broken.setattr(store, "client", lambda uri: (_ for _ in ()).throw(ConnectionError("gone")))
        with pytest.raises(TrackingError, match="does not take what is logged: gone"):
            tracker.deliver(run, tracked)
    assert points(uri, tracker.deliver(run, tracked))[-1][0] == 2


def test_starting_again_goes_on_with_the_same_run(run, uri):
    first = tracker.start(run, "a run")
    store.close(uri, first.run, "KILLED")
    assert tracker.start(run, "a run") == first
    assert MlflowClient(uri).get_run(first.run).info.status == "RUNNING"


FINALS = {
    "global/accuracy": "final/accuracy",
    "global/macro_f1": "final/macro_f1",
    "global/loss": "final/loss",
    "local/accuracy": "final/local_accuracy",
    "gap/accuracy": "final/gap",
    "rho/model": "final/rho",
    "rho/floor": "final/rho_floor",
    "bytes/total": "final/bytes",
}


def test_the_results_of_a_finished_run(run, uri):
    tracked = tracker.deliver(run, tracker.start(run, "a run"))
    tracker.finish(run, tracked, "## note")
    found = MlflowClient(uri).get_run(tracked.run)
    last = rounds.records(run)[-1].metrics
    for source, name in FINALS.items():
        assert found.data.metrics[name] == last[source]
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.note.content"] == "## note"
    assert found.data.tags["mlflow.source.name"] == "fedlora run"


def test_the_adapter_of_a_finished_run_is_its_model_once_however_often_it_is_logged(run, uri, monkeypatch):
    tracked = tracker.deliver(run, tracker.start(run, "a run"))
    client = MlflowClient(uri)
    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "finalize_logged_model", lambda *_: (_ for _ in ()).throw(ConnectionError("gone")))
        with pytest.raises(TrackingError, match="gone"):
            tracker.finish(run, tracked, "## note", patience_s=0)
    tracker.finish(run, tracked, "## note")
    (output,) = client.get_run(tracked.run).outputs.model_outputs
    (model,) = client.search_logged_models([tracked.experiment], f"source_run_id = '{tracked.run}'")
    assert output.model_id == model.model_id
    assert (model.name, model.status.value) == (f"{run.config.strategy} adapter", "READY")
    kept = Path(model.artifact_location.removeprefix("file://"))
    assert sorted(path.name for path in kept.iterdir()) == sorted(
        path.name for path in (run.path / "adapter").iterdir()
    )
    assert {metric.key for metric in model.metrics} >= {"final/accuracy", "final/rho"}


def test_a_sweep_holds_its_runs_and_is_closed_as_it_ended(run, uri):
    parent = parents.start(run.config.tracking, "mine", "mine-1", "## begun")
    child = tracker.start(run, "a run", parent=parent.run)
    assert MlflowClient(uri).get_run(child.run).data.tags["mlflow.parentRunId"] == parent.run
    with pytest.raises(KeyboardInterrupt), parents.closing(parent):
        raise KeyboardInterrupt
    assert MlflowClient(uri).get_run(parent.run).info.status == "KILLED"


def test_a_run_that_was_deleted_is_logged_again_from_the_start(run, uri):
    first = tracker.deliver(run, tracker.start(run, "a run"))
    MlflowClient(uri).delete_run(first.run)
    second = tracker.deliver(run, tracker.start(run, "a run"))
    assert second.run != first.run
    assert [point.step for point in MlflowClient(uri).get_metric_history(second.run, "rho/model")] == [1, 2]


def test_rounds_are_read_back_as_they_were_logged(run, uri):
    tracked = tracker.deliver(run, tracker.start(run, "a run"))
    client = MlflowClient(uri)
    found = history.records(client, client.get_run(tracked.run))
    written = rounds.records(run)
    assert [(record.round, record.timestamp_ms) for record in found] == [(r.round, r.timestamp_ms) for r in written]
    assert [dict(record.metrics) for record in found] == [dict(record.metrics) for record in written]


def test_a_parent_that_was_deleted_is_not_there(run, uri):
    parent = parents.start(run.config.tracking, "mine", "mine-2", "## begun")
    assert parents.there(parent)
    MlflowClient(uri).delete_run(parent.run)
    assert not parents.there(parent)


def test_a_deleted_experiment_is_named(uri):
    client = MlflowClient(uri)
    client.delete_experiment(store.experiment_id(client, uri, "gone"))
    with pytest.raises(TrackingError, match="'gone' was deleted; restore it"):
        store.experiment_id(client, uri, "gone")
    with pytest.raises(TrackingError, match="'gone' was deleted; restore it"):
        store.check_experiment(uri, "gone")


def test_an_experiment_is_checked_without_opening_the_store(uri, tmp_path, monkeypatch):
    """MLflow's client takes seconds, and would make a database; what cannot be known is left to it."""
    monkeypatch.setattr(store, "client", lambda uri: pytest.fail("opened"))
    for name in ("fedlora", "never seen", "it's \" odd"):
        store.check_experiment(uri, name)
    store.check_experiment(f"sqlite:///{tmp_path / 'none.db'}", "fedlora")
    (tmp_path / "other.db").write_bytes(b"no database" * 100)
    store.check_experiment(f"sqlite:///{tmp_path / 'other.db'}", "fedlora")
    assert [path.name for path in tmp_path.iterdir()] == ["other.db"]


NAMES = ("a b", "feature%2Fx 100%", "what?x=1#2")


@pytest.mark.parametrize("name", [" ".join(NAMES), *(pytest.param(name, marks=pytest.mark.system) for name in NAMES)])
def test_a_home_of_any_name_has_its_database_and_its_artifacts(monkeypatch, tmp_path, name):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / name))
    monkeypatch.chdir(tmp_path)
    uri = store.resolve_uri(None)
    assert not addresses.holds_secret(uri)
    store.check(uri)
    client = store.client(uri)
    experiment = store.experiment_id(client, uri, "x")
    store.check_experiment(uri, "x")
    run = client.create_run(experiment).info.run_id
    client.log_text(run, "hello", "tables/a.txt")
    assert Path(client.download_artifacts(run, "tables/a.txt")).read_text() == "hello"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {"mlflow.db", "mlartifacts"} <= {path.name for path in (tmp_path / name).iterdir()}
    client.delete_experiment(experiment)
    with pytest.raises(TrackingError, match="'x' was deleted"):
        store.check_experiment(uri, "x")


def test_a_question_mark_in_an_address_of_ones_own_is_refused_before_a_database_is_made(tmp_path):
    with pytest.raises(TrackingError, match=r"options begin at '\?', so the database would be .*/what; choose"):
        store.check(f"sqlite:///{tmp_path}/what?x/mlflow.db")
    assert not list(tmp_path.iterdir())


def test_where_things_are_logged(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert store.resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert store.resolve_uri(None) == "http://127.0.0.1:5000"
    assert store.resolve_uri("sqlite:///x.db") == "sqlite:///x.db"


class _Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_a_server_that_answers_passes_and_one_that_does_not_is_named():
    server = HTTPServer(("127.0.0.1", 0), _Health)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    store.check(url)
    server.shutdown()
    server.server_close()
    with pytest.raises(TrackingError, match=f"{url} does not answer"):
        store.check(url)


def test_the_page_of_a_sweep_is_not_sorted_by_date():
    """Sorted by date MLflow folds children under their parent, and its chart page is empty."""
    page = store.sweep_page("1", "abc", ACCURACY)
    assert "orderByKey=metrics.%60final%2Faccuracy%60" in page
    assert "parentRunId%60%20%3D%20%27abc%27" in page


def test_every_page_opens_in_model_training():
    """On a first visit MLflow's side bar is that of traces and prompts, and an experiment looks empty."""
    pages = [store.run_page("1", "abc"), store.artifact_page("1", "abc", "report/a.html")]
    pages += [store.sweep_page("1", "abc", ACCURACY), store.view_page("1", "abc"), store.model_page("fedlora-x")]
    assert [page.partition("?")[0] for page in pages] == [
        "#/experiments/1/runs/abc",
        "#/experiments/1/runs/abc/artifacts/report/a.html",
        "#/experiments/1/runs",
        "#/experiments/1/runs",
        "#/models/fedlora-x",
    ]
    for page in pages:
        assert parse_qs(page.partition("?")[2])["workflowType"] == ["machine_learning"]
