"""Several processes that log to one store at the same time, as parallel sweeps do: no point is lost, nobody fails."""

import os
import subprocess
import sys
from urllib.parse import unquote, urlsplit

import pytest
from mlflow import MlflowClient

from fedlora.run import rounds
from mlflow_tracking import store, tracker

WRITERS, ROUNDS = 2, 8
DELIVER = """
import multiprocessing
import sys
from pathlib import Path

import mlflow.artifacts
import mlflow.data.pandas_dataset
import mlflow.store.tracking.sqlalchemy_store  # by one process, which has opened nothing, for all of them
from fedlora.run.runfolder import RunFolder
from mlflow_tracking import tracker


def deliver(folders):
    for folder in folders:
        run = RunFolder(Path(folder))
        tracker.finish(run, tracker.start(run, "a run"), "note")


count, fork = int(sys.argv[1]), multiprocessing.get_context("fork")
writers = [fork.Process(target=deliver, args=(sys.argv[2 + index :: count],)) for index in range(count)]
for writer in writers:
    writer.start()
for writer in writers:
    writer.join()
print([writer.exitcode for writer in writers])
"""


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.system)])
def uri(request, tmp_path, monkeypatch):
    if request.param == "sqlite":
        return f"sqlite:///{request.getfixturevalue('with_databases')(tmp_path, 'mlflow.db') / 'mlflow.db'}"
    place = urlsplit(request.getfixturevalue("new_database")("parallel_tracking"))
    monkeypatch.setenv("PGPASSWORD", unquote(place.password))
    return f"postgresql+psycopg2://{place.username}@{place.hostname}:{place.port}{place.path}"


def test_every_point_of_every_writer_arrives(uri, finished, as_new, tmp_path):
    runs = [as_new(finished(), tmp_path / f"run-{number}") for number in range(2 * WRITERS)]
    for run in runs:
        last = run.read_json(run.record_name(2))
        for number in range(3, ROUNDS):
            run.write_json(run.record_name(number), {**last, "round": number})
    store.experiment_id(store.client(uri), uri, "fedlora")  # the schema is made once, before anybody else comes
    environ = {**os.environ, "MLFLOW_TRACKING_URI": uri, "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, "-c", DELIVER, str(WRITERS), *(str(run.path) for run in runs)]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == f"{[0] * WRITERS}\n", done.stderr
    assert "locked" not in done.stderr
    client = MlflowClient(uri)
    for run in runs:
        tracked = tracker.load(run)
        assert tracked.logged == ROUNDS - 1
        for name in rounds.read_record(run, 2).metrics:
            steps = [point.step for point in client.get_metric_history(tracked.run, name)]
            known = [record.round for record in rounds.records(run) if name in record.metrics]
            assert sorted(steps) == known, name
