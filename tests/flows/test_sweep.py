"""A sweep as people run it: compared, continued, side by side, and in a work pool with a real worker."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.settings import PREFECT_API_URL
from prefect.workers.process import ProcessWorker

from deployments.shipped import PRESETS, SWEEPS
from fedlora import report
from fedlora.config import configfile
from fedlora.errors import ConfigError, FedloraError
from fedlora.files import home
from fedlora.objective.classification import ACCURACY
from fedlora.sweep import comparison
from fedlora.sweep import plan as sweeps
from fedlora.sweep.folder import SweepFolder
from mlflow_tracking import store

ROOT = Path(__file__).resolve().parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))


@pytest.fixture(scope="module")
def write(tiny, store_uri, tmp_path_factory):
    """`write(name, grid)`: a tiny sweep in a file; its path."""
    place = tmp_path_factory.mktemp("sweeps")

    def file(name, grid, **changes):
        common = {**tiny, "rounds": 1, "tracking.uri": store_uri, "tracking.experiment": "sweeps", **changes}
        path = place / f"{name}.yaml"
        path.write_text(configfile.yaml.safe_dump({"name": name, "set": common, **grid}))
        return str(path)

    return file


@pytest.fixture(scope="module")
def run(prefect_server):
    """`run(file, …)`: the flow; the sweep's folder as it is afterwards."""
    from flows.sweep import run_sweep

    return lambda file, **how: SweepFolder.read(Path(run_sweep(file, **how)))


@dataclass(frozen=True)
class Partly:
    """A sweep in a file, of whose runs one finishes and two cannot begin: they have a label of one class only."""

    file: str
    bad: tuple[Path, Path]
    first: SweepFolder
    """As it was when it had been run once."""


@pytest.fixture(scope="module")
def partly(run, write, labelled, tmp_path_factory):
    place = tmp_path_factory.mktemp("own")
    bad = tuple(labelled(place / f"{name}.csv", label="a") for name in ("one", "other"))
    own = [{"strategy": "svd", "data.name": str(path), "data.train_size": None, "clients": 2} for path in bad]
    file = write("partly", {"cells": [{"strategy": "svd"}, *own], "skip": [{"strategy": "flora"}]})
    return Partly(file, bad, run(file))


@pytest.fixture(scope="module")
def alone(partly, run, write):
    """A sweep of two runs, one after the other; later than `partly`."""
    return run(write("alone", {"grid": {"strategy": ["fedit", "svd"]}}))


def children(store_uri, folder):
    client = MlflowClient(store_uri)
    query = f"tags.`mlflow.parentRunId` = '{folder.parent['run']}'"
    return client.search_runs([folder.parent["experiment"]], query)


def statuses(folder):
    return {cell.label: cell.status for cell in folder.cells}


def left_by(store_uri, folder):
    """Everything that a repeat could change: the parent in MLflow with its artifacts' ages, and the sweep's folder."""
    client = MlflowClient(store_uri)
    parent = client.get_run(folder.parent["run"])
    artifacts = Path(parent.info.artifact_uri.removeprefix("file://"))
    files = [path for root in (artifacts, folder.path) for path in sorted(root.rglob("*")) if path.is_file()]
    ages = {str(path): path.stat().st_mtime_ns for path in files if path.name != "lock"}
    return parent.to_dictionary(), ages


def test_a_repeat_that_finds_all_done_changes_nothing(run, store_uri, partly, alone):
    """Nor is it the latest: that is the sweep that ended last, although the other was asked for after it."""
    from mlflow_tracking import compare

    before = left_by(store_uri, partly.first)
    assert len(before[1]) > 10
    again = run(partly.file)
    assert again == partly.first
    assert left_by(store_uri, again) == before
    assert compare.find(compare.LATEST, store_uri).instance == alone.instance
    (again.path / "comparison.csv").unlink()  # what is not there any more is made again
    run(partly.file)
    assert (again.path / "comparison.csv").is_file()
    assert compare.find(compare.LATEST, store_uri).instance == again.instance


def test_bad_cells_lose_nothing_and_are_looked_at_anew(run, store_uri, partly, labelled):
    """They left no trace. Also without --retry-failed: they did not fail, they never began."""
    first = partly.first
    assert [cell.status for cell in first.cells] == ["finished", "failed", "failed"]
    assert all("class" in cell.reason for cell in first.cells[1:])
    assert len(children(store_uri, first)) == 1
    labelled(partly.bad[0])
    again = run(partly.file)
    assert again.path == first.path
    assert [cell.status for cell in again.cells] == ["finished", "finished", "failed"]
    assert again.cells[0].run == first.cells[0].run  # not repeated
    finished = [child for child in children(store_uri, again) if child.info.status == "FINISHED"]
    assert {child.info.run_id for child in finished} == {cell.run for cell in again.cells[:2]}
    labelled(partly.bad[1])
    mended = run(partly.file, retry_failed=True)
    assert [cell.status for cell in mended.cells] == ["finished"] * 3
    parent = MlflowClient(store_uri).get_run(mended.parent["run"])
    assert parent.info.status == "FINISHED"
    note = parent.data.tags["mlflow.note.content"]
    pages = [store.run_page(mended.parent["experiment"], str(cell.run)) for cell in mended.cells]
    assert all(f"[run]({page})" in note for page in pages)


def test_side_by_side_is_the_same_as_one_after_the_other(run, write, store_uri, alone):
    together = run(write("together", {"grid": {"strategy": ["fedit", "svd"]}}), parallel=2)
    assert set(statuses(together).values()) == {"finished"}
    results = []
    for folder in (alone, together):
        client = MlflowClient(store_uri)
        results.append([client.get_run(cell.run).data.metrics["final/loss"] for cell in folder.cells])
        assert len(children(store_uri, folder)) == 2
    assert results[0] == results[1]
    assert len(set(results[0])) == 2


def test_fresh_begins_anew_and_so_does_a_sweep_whose_parent_was_deleted(run, write, store_uri):
    file = write("anew", {"grid": {"strategy": ["fedit"]}})
    first = run(file)
    second = run(file, fresh=True)
    MlflowClient(store_uri).delete_run(second.parent["run"])
    third = run(file)
    assert len({folder.path for folder in (first, second, third)}) == 3
    assert len({folder.parent["run"] for folder in (first, second, third)}) == 3
    assert len({folder.cells[0].run for folder in (first, second, third)}) == 3
    assert third.cells[0].status == "finished"


def state_of(folder):
    """The final state of the flow run that made an execution."""
    with get_client(sync_client=True) as client:
        return client.read_flow_run(folder.flow_runs[-1]).state


def test_a_night_on_which_a_score_fell_ends_as_a_regression(run, write, store_uri):
    """The first night has nothing to compare with. Then its scores are made higher, and a second night runs."""
    file = write("nights", {"grid": {"strategy": ["fedit"], "seed": [0, 1]}, "champion": False})
    first = run(file)
    state = state_of(first)
    assert (state.type.value, state.name) == ("COMPLETED", "Completed")
    assert state.message == "the first execution of this name and plan: there is none to compare with"
    assert not (first.path / "report" / "changes.html").exists()
    client = MlflowClient(store_uri)
    for place, cell in enumerate(first.cells):
        client.log_metric(cell.run, "final/accuracy", 0.9 + place / 1000, step=1000)
    second = run(file, fresh=True)
    assert second.before().path == first.path
    state = state_of(second)
    assert (state.type.value, state.name) == ("COMPLETED", "Regression")
    assert state.message == f"fedit fell beyond noise since {first.instance}"
    assert {path.name for path in (second.path / "report").glob("changes.*")} == set(report.CHANGES)
    logged = {entry.path for entry in client.list_artifacts(second.parent["run"], "report")}
    assert "report/changes.html" in logged
    note = client.get_run(second.parent["run"]).data.tags["mlflow.note.content"]
    assert f"Since the last: fedit fell beyond noise since {first.instance}." in note
    assert "report/changes.html" in note
    told = [each["data"] for each in artifacts("sweep-changes")]
    assert sum("1 of 1 score fell beyond noise" in each for each in told) == 1
    assert sum(each.startswith("the first execution") for each in told) >= 1


def artifacts(key):
    with get_client(sync_client=True) as client:
        return client.request("POST", "/artifacts/filter", json={"artifacts": {"key": {"any_": [key]}}}).json()


def test_where_nothing_finishes_the_sweep_fails_and_says_why(run, write, labelled, tmp_path):
    bad = labelled(tmp_path / "own.csv", label="a")
    file = write("hopeless", {"grid": {"strategy": ["fedit"]}}, **{"data.name": str(bad), "data.train_size": None})
    with pytest.raises(FedloraError, match=r"sweep hopeless: no run can begin; the first, fedit: .*class"):
        run(file)


def test_after_each_run_mlflow_is_asked_for_that_one_alone(write, tmp_path, monkeypatch):
    """All that have finished would be rows with the square of their number."""
    from flows import sweep

    plan = sweeps.load(write("many", {"grid": {"seed": list(range(12))}}), {}, PRESETS, SWEEPS)
    folder = SweepFolder.choose(tmp_path, plan, fresh=True)
    folder.begin(plan, "", False)
    parent, said, rows = sweep.open_parent(plan, folder), [], []
    client, search = MlflowClient(parent.uri), store.search_runs
    monkeypatch.setattr(store, "search_runs", lambda *words: rows.extend(found := search(*words)) or found)
    for cell in plan.cells:
        tags = {"mlflow.parentRunId": parent.run, "fedlora.config": cell.digest}
        client.set_terminated(client.create_run(parent.experiment, tags=tags).info.run_id)
        sweep.note(plan, folder, parent, cell, None, SimpleNamespace(say=said.append))
    assert set(statuses(folder).values()) == {"finished"}
    assert len(rows) == len(plan.cells) == len({cell.run for cell in folder.cells})


@pytest.fixture
def deployed(prefect_server, request):
    """A work pool with a deployment of the flow and nobody who serves it; and the environment for those who would."""
    name = f"pool-{len(request.node.name)}"  # one per test: a worker that ended counts as online for a while
    environ = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), "PREFECT_WORKER_QUERY_SECONDS": "1"}
    with get_client(sync_client=True) as client:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
    flow = Flow.from_source(str(ROOT), "flows/federated.py:federated")
    flow.deploy(name="custom", work_pool_name=name, build=False, push=False, print_next_steps=False)
    return name, environ


@pytest.fixture
def pool(deployed, tmp_path):
    """The work pool with a worker process that serves it."""
    from flows import handover

    name, environ = deployed
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [PREFECT, "worker", "start", "--pool", name], env=environ, stdout=log, stderr=log, cwd=tmp_path
        )
        handover.check(name, patience=90)
        yield name
        for process in [*psutil.Process(worker.pid).children(recursive=True), worker]:
            process.kill()  # Prefect's worker takes its time to leave when it is asked to
        worker.wait(30)


@pytest.mark.system
def test_a_work_pool_executes_the_runs(run, write, pool, store_uri):
    file = write("handed", {"grid": {"strategy": ["fedit", "svd"]}, "base": "base.yaml"})
    Path(file).with_name("base.yaml").write_text("clients: 3\nrounds: 1\n")  # which a worker elsewhere has not
    folder = run(file, pool=pool)
    assert statuses(folder) == {"fedit": "finished", "svd": "finished"}
    plan = sweeps.load(file, None, PRESETS, SWEEPS)
    assert {child.data.tags["fedlora.config"] for child in children(store_uri, folder)} == {
        cell.digest for cell in plan.cells
    }
    assert (home.runs() / folder.instance).is_dir()


def test_a_pool_that_does_not_exist_or_has_no_worker_is_one_clear_line(prefect_server):
    from flows import handover

    with pytest.raises(
        ConfigError, match=r"there is no work pool 'cpu-wrokers'\..* There are: .*prefect work-pool create"
    ):
        handover.check("cpu-wrokers")
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="idle", type="process"))
    with pytest.raises(ConfigError, match="work pool 'idle' has no deployment of the flow 'federated'"):
        handover.check("idle")


def test_a_pool_without_worker_or_without_room_is_one_clear_line(deployed, monkeypatch):
    from flows import handover

    name, _ = deployed
    with pytest.raises(ConfigError, match=f"no worker is online in work pool '{name}'.*prefect worker start --pool"):
        handover.check(name, patience=1)
    with get_client(sync_client=True) as client:
        client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=1))
        own = client.create_flow_run_from_deployment(client.read_deployment_by_name("federated/custom").id)
        monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(own.id))
        with pytest.raises(ConfigError, match="occupies the only place of work pool"):
            handover._check_room(name)
        client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=2))
        handover._check_room(name)
        client.delete_flow_run(own.id)


def test_of_equals_on_the_leaderboard_the_first_stays_first_and_each_links_to_its_runs():
    from flows import outcome

    names = ["fedit", "svd", "svd", "a|b"]
    rows = {name: [0.5, 0.7, 0.3, 0.9] for name in comparison.COLUMNS}
    table = pd.DataFrame({"strategy": names, "seed": [0, 0, 1, 0], **rows, "page": ["#a", "#b", "#c", "#d"]})
    lines = outcome._leaderboard(["strategy", "seed"], table, ACCURACY)[2:]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| 1", "a\\|b", "[0](#d)"], ["| 2", "fedit", "[0](#a)"], ["| 3", "svd", "[0](#b) [1](#c)"]
    ]  # fmt: skip
    shown = [line.split(" | ")[3].replace("&nbsp;", " ").strip() for line in lines]
    assert shown == ["0.900", "0.500", "0.500 ± 0.283"]


def test_places_are_those_within_a_condition(tmp_path):
    from flows import outcome

    file = tmp_path / "x.yaml"
    file.write_text("name: x\ngrid: {partition.alpha: [0.1, 100], strategy: [fedit, svd]}\n")
    plan = sweeps.load(str(file), None, PRESETS, SWEEPS)
    rows = {name: [0.1, 0.2, 0.9, 0.8] for name in comparison.COLUMNS}
    table = pd.DataFrame([cell.settings for cell in plan.cells]).assign(**rows, page="#")
    lines = list(outcome._leaderboards(plan, table, ACCURACY))
    assert [line for line in lines if line.startswith("**")] == ["**partition.alpha=0.1**", "**partition.alpha=100**"]
    assert [line[:9] for line in lines if line.startswith(("| 1", "| 2"))] == [
        "| 1 | svd", "| 2 | fed", "| 1 | fed", "| 2 | svd"
    ]  # fmt: skip
