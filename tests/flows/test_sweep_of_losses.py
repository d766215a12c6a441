"""A sweep of tiny decoders as people run it: judged by their loss, of which less is better, wherever it is shown."""

import base64
import html
import json
import re
import zlib
from pathlib import Path

import pandas as pd
import pytest
from markdown_it import MarkdownIt
from mlflow import MlflowClient
from prefect.client.orchestration import get_client

from fedlora.config import configfile
from fedlora.report import VERDICT, answers
from fedlora.sweep.folder import SweepFolder


@pytest.fixture(scope="module")
def swept(writing, store_uri, prefect_server, tmp_path_factory):
    """The folder of a finished sweep of one that trains and one that hardly does, two seeds each."""
    from flows.sweep import run_sweep

    judged = {"scorers": ["exact"], "decides": "loss", "examples": 4, "max_new_tokens": 3}
    common = {
        **writing,
        **{f"evaluation.generate.{key}": value for key, value in judged.items()},
        "rounds": 1,
        "tracking.uri": store_uri,
        "tracking.experiment": "losses",
    }
    path = tmp_path_factory.mktemp("sweeps") / "losses.yaml"
    grid = {"training.learning_rate": [1e-6, 0.05], "seed": [0, 1]}
    path.write_text(configfile.yaml.safe_dump({"name": "losses", "set": common, "grid": grid}))
    return SweepFolder.read(Path(run_sweep(str(path))))


@pytest.fixture
def parent(swept, store_uri):
    return MlflowClient(store_uri).get_run(swept.parent["run"])


def test_the_one_that_learns_has_the_lower_loss_and_is_the_best(swept):
    found = json.loads((swept.path / "report" / VERDICT).read_text())
    (condition,) = found["conditions"]
    assert condition["best"].endswith("learning_rate=0.05")
    first, second = condition["standings"]
    assert first["score"] < second["score"]
    assert second["regret"] == pytest.approx(second["score"] - first["score"])
    assert (found["score"], found["higher_is_better"]) == ("final loss", False)
    assert re.search(r"\bloss \d\.\d{3} \(", found["verdict"][0])
    board = pd.read_csv(swept.path / "report" / "leaderboard.csv")
    assert board["loss"].is_monotonic_increasing
    assert "accuracy" not in board


def test_its_page_and_its_view_in_mlflow_are_of_the_loss(swept, store_uri, parent):
    note = parent.data.tags["mlflow.note.content"]
    rows = [line for line in note.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert "0.05" in rows[0]
    assert "| loss | ρ first" in note
    assert "[loss and ρ]" in note
    assert {name.split("/")[1] for name in parent.data.metrics} == {"loss", "rho"}
    tags = MlflowClient(store_uri).get_experiment(swept.parent["experiment"]).tags
    packed = json.loads(tags[f"mlflow.sharedViewState.{swept.parent['run']}"])["state"].partition(";")[2]
    view = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert view["compareRunSections"][0]["name"] == "loss and ρ"
    assert [chart["metricKey"] for chart in view["compareRunCharts"]] == ["global/loss", "rho/model", "final/loss"]
    assert "metrics.`final/loss`" in view["selectedColumns"]


def test_its_champion_is_the_lower_one_under_a_name_of_its_task(swept, store_uri):
    version = MlflowClient(store_uri).get_model_version_by_alias("fedlora-losses-generation", "champion")
    params = MlflowClient(store_uri).get_run(version.run_id).data.params
    assert float(params["training.learning_rate"]) == 0.05
    losses = [
        MlflowClient(store_uri).get_run(cell.run).data.metrics["final/loss"]
        for cell in swept.cells
        if cell.settings["training.learning_rate"] == 0.05
    ]
    assert MlflowClient(store_uri).get_run(version.run_id).data.metrics["final/loss"] == min(losses)


def test_its_report_is_made_again_from_mlflow(swept, store_uri, tmp_path):
    from flows.report import write_report

    written = write_report(swept.instance, tmp_path / "again", store_uri)
    assert written.comparison.criterion.name == "loss"
    assert {"exact", "token_accuracy"} <= {score.name for score in written.comparison.scores[1:]}
    assert not written.comparison.labelled
    standing = written.decision.conditions[0].best
    runs = written.comparison.runs.set_index("run_id").loc[list(standing.setting.seeds.values())]
    assert standing.results["token_accuracy"].values == tuple(runs["final/token_accuracy"])
    worst = written.comparison.rounds.set_index(["run_id", "round"])["local/loss_worst"]
    assert standing.results["worst_client"].values == tuple(worst[run, 1] for run in runs.index)


def test_what_was_written_is_side_by_side_on_the_flow_run_s_page(swept):
    with get_client(sync_client=True) as client:
        asked = {"artifacts": {"key": {"any_": ["answers"]}}}
        (found,) = client.request("POST", "/artifacts/filter", json=asked).json()
    lines = found["data"].splitlines()
    prompts = [line for line in lines if line.startswith("**")]
    assert 1 <= len(prompts) <= answers.MOST
    for title in ("reference", "before training"):
        assert sum(line.startswith(f"- *{title}*: ") for line in lines) == len(prompts)
    choices = [line for line in lines if re.match(r"- \*fedit.*training\\\.learning\\_rate\\=", line)]
    assert len(choices) == 2 * len(prompts)


@pytest.mark.parametrize("text", ["3 * 4 * 5", "a | b", "[x](http://y)", "<b>", "`x`", "__init__", "\\ $1$", "é – ρ"])
def test_what_a_model_writes_is_never_markdown(text):
    from flows.report import literal

    rendered = MarkdownIt().enable(["table", "strikethrough"]).render(f"| a |\n|---|\n| {literal(text)} |")
    assert f"<td>{html.escape(text, quote=False)}</td>" in rendered
