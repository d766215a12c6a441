"""A real Prefect server for the session, a real SQLite MLflow store, and flows run on them."""

import pytest
from prefect import settings
from prefect.settings import temporary_settings
from prefect.testing.utilities import prefect_test_harness

from fedlora.runfolder import RunFolder


@pytest.fixture(scope="session")
def prefect_server():
    """Prefect with a database of its own; without heartbeats, whose end costs a second per flow."""
    with (
        prefect_test_harness(server_startup_timeout=120),
        temporary_settings({settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield


@pytest.fixture(scope="session")
def store_uri(tmp_path_factory):
    """An MLflow store in a SQLite file, its schema made once."""
    from mlflow_tracking import store

    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    store.experiment_id(store.client(uri), uri, "tests")
    return uri


@pytest.fixture(scope="session")
def run_flow(prefect_server, store_uri, tiny, tmp_path_factory):
    """`run_flow({"strategy": "svd"}, run_dir=…)`: a tiny run through the flow; returns its `RunFolder`."""
    from flows.federated import federated

    def run(changes=None, run_dir=None, **parameters):
        overrides = {**tiny, "tracking.uri": store_uri, "tracking.experiment": "tests", **(changes or {})}
        folder = run_dir or tmp_path_factory.mktemp("flow") / "run"
        return RunFolder(federated(preset="demo", overrides=overrides, run_dir=str(folder), **parameters))

    return run


@pytest.fixture(scope="session")
def finished_flow(run_flow):
    """The run that most tests look at: FedIT, two rounds. Not to be written to."""
    return run_flow({"strategy": "fedit", "tracking.adapter_every": 1})
