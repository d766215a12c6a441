"""`fedlora resume`: whatever name a person has for a run, and an end as if it had not been interrupted."""

import json
import shutil

import pytest
from mlflow import MlflowClient

from fedlora.errors import ConfigError
from fedlora.files import home
from fedlora.run.runfolder import RunFolder
from fedlora_cli import which_run
from mlflow_tracking import tracker


@pytest.fixture
def interrupted(finished_flow, tmp_path):
    """A copy of a finished run of two rounds, as it was when the first client of the last one had been trained."""
    folder = shutil.copytree(finished_flow.path, tmp_path / "run")
    for pattern in ("rounds/002/[rs]*", "rounds/002/client-00[12].*", "adapter/*", "tables/*"):
        for path in folder.glob(pattern):
            path.unlink() if path.is_file() else shutil.rmtree(path)
    return folder


def test_a_folder_is_continued_to_the_same_end(fedlora, prefect_server, interrupted, finished_flow):
    code, out, err = fedlora("resume", interrupted)
    assert (code, err) == (0, "")
    assert f"run folder: {interrupted}" in out
    assert "MB" in next(line for line in out.splitlines() if line.startswith("run folder        "))
    for name in ("adapter/adapter_model.safetensors", "rounds/002/state.safetensors"):
        assert (interrupted / name).read_bytes() == (finished_flow.path / name).read_bytes()
    tracked = tracker.load(RunFolder(interrupted))
    assert tracked.run == tracker.load(finished_flow).run  # the same run in MLflow, and no point twice
    client = MlflowClient(tracked.uri)
    steps = [point.step for point in client.get_metric_history(tracked.run, "global/accuracy")]
    assert steps == [0, 1, 2]
    assert client.get_run(tracked.run).info.status == "FINISHED"


def test_a_folder_that_is_at_work_is_refused(fedlora, prefect_server, interrupted):
    with RunFolder(interrupted).held():
        code, _, err = fedlora("resume", interrupted)
    assert code == 1
    assert "is under way (process " in err
    assert len(err.splitlines()) == 1


class TestNames:
    def test_of_mlflow_and_prefect(self, finished_flow, store_uri, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri)
        tracked = tracker.load(finished_flow)
        flow_run = MlflowClient(store_uri).get_run(tracked.run).data.tags["prefect.flow_run_id"]
        assert which_run.folder_of(tracked.run) == finished_flow.path
        assert which_run.folder_of(flow_run) == finished_flow.path

    def test_among_the_runs_of_the_home(self, monkeypatch, tmp_path):
        monkeypatch.setenv("FEDLORA_HOME", str(tmp_path))
        (home.runs() / "fedit-seed0").mkdir(parents=True)
        assert which_run.folder_of("fedit-seed0") == home.runs() / "fedit-seed0"
        assert which_run.folder_of(str(home.runs() / "fedit-seed0")) == home.runs() / "fedit-seed0"
        with pytest.raises(ConfigError, match=r"no run 'fedit-seed1'.* Did you mean 'fedit-seed0'\?"):
            which_run.folder_of("fedit-seed1")

    @pytest.mark.parametrize("run", ["0" * 32, "00000000-0000-0000-0000-000000000000"])
    def test_that_the_store_does_not_know(self, store_uri, monkeypatch, run):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri)
        with pytest.raises(ConfigError, match=rf"knows no run {run}; name its folder instead"):
            which_run.folder_of(run)

    def test_of_a_run_of_somebody_else(self, store_uri, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri)
        client = MlflowClient(store_uri)
        other = client.create_run(client.get_experiment_by_name("tests").experiment_id).info.run_id
        with pytest.raises(ConfigError, match="is none of fedlora's"):
            which_run.folder_of(other)
        client.set_tag(other, "fedlora.run_folder", "/nowhere/run")
        with pytest.raises(ConfigError, match=r"/nowhere/run, is not on this machine"):
            which_run.folder_of(other)

    def test_of_a_sweep(self, tmp_path):
        (tmp_path / "sweep.json").write_text(json.dumps({}))
        with pytest.raises(ConfigError, match="is a sweep; the command that began it"):
            which_run.folder_of(str(tmp_path))

    def test_of_a_folder_without_a_run(self, fedlora, tmp_path):
        code, _, err = fedlora("resume", tmp_path)
        assert code == 1
        assert err == f"error: {tmp_path} holds no run: it has neither run.json nor config.yaml\n"
