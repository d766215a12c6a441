"""Runs as the tracker leaves them, with made-up numbers, in a real SQLite store."""

import json

import pytest

from mlflow_tracking import store

COUNTS = {"labels": ["a", "b"], "label_counts": [[1, 2], [3, 4]], "partitioner": "iid"}


@pytest.fixture(scope="module")
def uri(with_databases, tmp_path_factory):
    return f"sqlite:///{with_databases(tmp_path_factory.mktemp('store'), 'mlflow.db') / 'mlflow.db'}"


class Shelf:
    """Writes runs as the tracker does, with made-up numbers."""

    counts = COUNTS

    def __init__(self, uri, tmp_path):
        self.uri, self.client, self.folder = uri, store.client(uri), tmp_path

    def experiment(self, name):
        return store.experiment_id(self.client, self.uri, name)

    def run(
        self, experiment, strategy, seed, accuracy=0.5, status="FINISHED", parent=None, files=True, score="accuracy",
        **params,
    ):  # fmt: skip
        tags = {"strategy": strategy, "fedlora.config": f"{strategy}-{seed}-{params}", "partition.hash": f"hash{seed}"}
        tags |= {"mlflow.parentRunId": parent} if parent else {}
        run = self.client.create_run(
            self.experiment(experiment), tags=tags, run_name=f"{strategy} seed {seed}"
        ).info.run_id
        for key, value in {"strategy": strategy, "seed": seed, **params}.items():
            self.client.log_param(run, key, value)
        for number in range(2):
            self.client.log_metric(run, f"global/{score}", accuracy * number, timestamp=number, step=number)
        if status == "FINISHED":
            self.client.log_metric(run, f"final/{score}", accuracy)
            if files:
                self.file(run, "partition.json", COUNTS)
                self.file(run, "config.yaml", {"strategy": strategy, "lora": {"rank": 4}})
                self.file(run, "tables/divergence.json", [{"round": 1, "module": "m", "rho": 0.25}])
                self.file(run, "tables/clients.json", [{"round": 1, "client": 0, "examples": 7}])
        if status != "RUNNING":
            self.client.set_terminated(run, status)
        return run

    def file(self, run, name, content):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
        self.client.log_artifact(run, str(path), "tables" if "/" in name else None)

    def sweep(self, experiment, name, instance=None, end=True, start=None):
        tags = {"sweep": name} | ({"fedlora.sweep": instance} if instance else {})
        run = self.client.create_run(
            self.experiment(experiment), start, tags=tags, run_name=f"sweep {name}"
        ).info.run_id
        if end:
            self.client.set_terminated(run)
        return run


@pytest.fixture
def new_shelf(tmp_path, monkeypatch):
    """`new_shelf(uri)`: writes into that store."""
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    return lambda uri: Shelf(uri, tmp_path)


@pytest.fixture
def shelf(uri, new_shelf):
    return new_shelf(uri)
