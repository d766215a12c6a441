"""The report flow on a real Prefect server and MLflow store, from a real tiny sweep of two strategies."""

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client

from fedlora.errors import RunFolderError, TrackingError
from fedlora.files import home
from fedlora_cli import watching
from mlflow_tracking import store


@pytest.fixture(scope="module")
def parent(run_flow, store_uri):
    """A finished sweep's run in MLflow with two children."""
    client = MlflowClient(store_uri)
    experiment = store.experiment_id(client, store_uri, "tests")
    tags = {"sweep": "pair", "fedlora.sweep": "pair-1"}
    run = client.create_run(experiment, tags=tags, run_name="sweep pair").info.run_id
    for strategy in ("fedit", "svd"):
        run_flow({"strategy": strategy}, mlflow_parent=run)
    client.set_terminated(run)
    return run


@pytest.fixture(autouse=True)
def _tracked(store_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store_uri)


def artifacts(key):
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/filter", json={"artifacts": {"key": {"any_": [key]}}})
        return found.json()


def test_the_page_is_written_logged_and_linked(parent, store_uri, prefect_server):
    from fedlora import report
    from flows.report import make_report

    page = make_report(source="pair")
    assert page == str(home.sweeps() / "pair-1" / "report" / "report.html")
    names = {entry.path for entry in MlflowClient(store_uri).list_artifacts(parent, "report")}
    assert names == {f"report/{name}" for name in ("report.html", report.VERDICT, *(f"{t}.csv" for t in report.TABLES))}
    (summary,) = artifacts("report")
    assert "| choice |" in summary["data"]
    assert "svd" in summary["data"]
    assert "/artifacts/report/report.html" in summary["data"]
    (link,) = artifacts("report-page")
    assert f"{parent}/artifacts/report/report.html" in link["data"]
    results, folder = said("report pair-1")
    assert results.startswith("results: http")
    assert f"{parent}/artifacts/report/report.html" in results
    assert folder == f"folder: {home.sweeps() / 'pair-1' / 'report'}"


def said(flow_run):
    """The lines that `fedlora watch` shows of it."""
    shown = []
    watching.follow(flow_run, shown.append)
    return [line.split("  ", 1)[1] for line in shown[1:]]


def test_of_an_experiment_the_flow_says_where_on_disk_the_page_is(parent, prefect_server):
    from flows.report import make_report

    page = make_report(source="experiment:tests")
    assert said("report tests")[0] == f"results: file://{page}"


def test_without_a_flow_and_to_a_folder_of_one_s_own(parent, store_uri, tmp_path):
    from flows.report import write_report

    written = write_report("pair-1", tmp_path / "mine", store_uri)
    assert written.page == tmp_path / "mine" / "report.html"
    text = written.page.read_text()
    assert "Partition shared." in text
    for section in ("leaderboard", "accuracy", "rho", "related", "local", "costs", "partition", "configs"):
        assert f'<section id="{section}">' in text
    assert 'id="plot-layers-last"' in text
    assert 'id="plot-partition"' in text


def test_two_side_by_side_on_the_command_line(parent, fedlora, tmp_path):
    """The experiment holds the runs of the sweep, so that both are the same."""
    code, out, _ = fedlora("report", "experiment:tests", "pair", "--verdict")
    assert code == 0
    assert "No score changed beyond noise, of 2; 2 could not be tested (one common seed" in " ".join(out.split())
    assert not list(tmp_path.iterdir())
    code, out, _ = fedlora("report", "experiment:tests", "pair", "--out", tmp_path / "new")
    assert code == 0
    assert "from tests\nto   pair-1\n" in out
    assert f"changes           {tmp_path / 'new' / 'changes.html'}" in out
    assert f"{parent}/artifacts/report/changes.html" in out
    assert "no pairs" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("pair", "pair-1"), "'pair' and 'pair-1' are both pair-1; name two executions, or `fedlora report previous"),
        (("previous", "pair"), "pair-1 has no finished execution of the same name and plan before it"),
        (("pare", "pair"), "no sweep or experiment 'pare'"),
    ],
)
def test_two_that_cannot_be_compared_are_one_line(parent, fedlora, words, said):
    code, _, err = fedlora("report", *words)
    assert code != 0
    assert said in " ".join(err.split())


def test_an_experiment_has_a_folder_for_reports_and_no_run_to_log_to(parent, store_uri):
    from flows.report import write_report

    written = write_report("tests", None, store_uri)
    assert written.page == home.home() / "reports" / "tests" / "report.html"
    assert written.link == written.page.as_uri()


def test_mistakes_are_one_line(parent, store_uri, tmp_path):
    from flows.report import write_report

    with pytest.raises(TrackingError, match=r"no sweep or experiment 'pare'.*Did you mean 'pair'\?"):
        write_report("pare", None, store_uri)
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunFolderError, match="another --out"):
        write_report("pair", tmp_path / "taken", store_uri)


def test_a_name_cannot_lead_out_of_the_reports_folder():
    from flows.report import default_folder
    from mlflow_tracking.compare import Source

    assert default_folder(Source("../../etc/x y", "1")) == home.home() / "reports" / "etc-x-y"
    assert default_folder(Source("..", "1")) == home.home() / "reports" / "report"
