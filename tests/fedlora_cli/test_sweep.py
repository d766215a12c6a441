"""`fedlora sweep` as a user meets it: what it prints, what it returns, and one clear line for each mistake."""

import re
import subprocess
import sys

import pandas as pd
import pytest
from mlflow import MlflowClient

from fedlora.files import home


def test_sweep_compares_strategies_on_one_partition_and_what_has_finished_is_not_repeated(
    fedlora, small, prefect_server, tmp_path, store_uri
):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nbase: demo\ngrid:\n  strategy: [fedit, svd]\n  seed: [0, 1]\n")
    code, out, _ = fedlora("sweep", file, *small, "rounds=1")
    assert code == 0
    assert "mean ± standard deviation over 2 seeds" in out
    assert "2 partitions (hashes " in out
    assert "one for each seed" in out
    assert re.search("ρ +clients *\n.* last +floor +used", out)
    folder = next(home.sweeps().glob("mine-*"))
    table = pd.read_csv(folder / "comparison.csv")
    assert list(zip(table["strategy"], table["seed"], strict=True)) == [
        ("fedit", 0), ("fedit", 1), ("svd", 0), ("svd", 1),
    ]  # fmt: skip
    assert table.groupby("seed")["partition"].nunique().tolist() == [1, 1]
    assert (folder / "comparison.png").is_file()
    client = MlflowClient(store_uri)
    experiment = client.get_experiment_by_name("cli").experiment_id
    parent = client.search_runs([experiment], "tags.sweep = 'mine'")[0]
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(children) == 4
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    assert "| svd |" in parent.data.tags["mlflow.note.content"]
    code, out, _ = fedlora("sweep", file, *small, "rounds=1")
    assert code == 0
    assert "4 of 4 runs had finished before, not repeated" in out
    assert "before training" not in out
    _, out, _ = fedlora("sweep", file, *small, "rounds=1", "--dry-run")
    assert out.split("fedit", 1)[1].split()[:2] == ["0", "finished"]
    assert "takes about 0 s" in out


@pytest.fixture
def mine(tmp_path):
    """A sweep of two strategies, one of which refuses the setting that is given on the command line."""
    file = tmp_path / "mine.yaml"
    file.write_text("name: listed\nbase: demo\ngrid:\n  strategy: [fedit, svd, ravan]\n")
    return file


def test_a_dry_run_lists_runs_time_and_memory_and_runs_nothing(fedlora, small, mine, store_uri):
    code, out, _ = fedlora("sweep", mine, *small, "lora.rank=6", "runner.kind=processes", "--dry-run")
    assert code == 0
    rows = [line.split() for line in out.splitlines() if line.strip().startswith(("fedit", "svd"))]
    assert [row[:3] for row in rows] == [["fedit", "to", "run"], ["svd", "to", "run"]]
    assert all(row[-1] == "GB" and 0.1 < float(row[-2]) < 10 for row in rows)
    assert rows[0][3:] == rows[1][3:]  # one trial for all that is alike
    assert "skipped: ravan: strategy=ravan does not go with lora.rank=6" in out
    assert "2 runs; what is left takes about" in out
    assert not list(home.sweeps().glob("listed-*"))


def test_a_run_that_failed_is_told_and_is_the_exit_code(fedlora, small, tmp_path, prefect_server, labelled):
    bad = labelled(tmp_path / "own.csv", label="a")
    file = tmp_path / "partly.yaml"
    broken = {"strategy": "svd", "data.name": str(bad), "data.train_size": None}
    file.write_text(f"name: partly\nbase: demo\ncells: [{{strategy: fedit}}, {broken}]\n".replace("None", "null"))
    words = [word for word in small if not word.startswith(("data.name", "data.train_size"))]
    words += ["rounds=1", "data.test_size=60"]
    code, out, _ = fedlora("sweep", file, *words)
    assert code == 1
    assert "failed: svd" in out
    assert "class" in out
    assert any(line.strip().startswith("fedit") for line in out.splitlines())


def test_what_cannot_begin_is_told_before_anything_is_tried(fedlora, small, tmp_path, store_uri):
    """In a dry run, and with a code that a script sees."""
    file = tmp_path / "partly.yaml"
    file.write_text("name: checked\nbase: demo\ngrid:\n  lora.rank: [4, 400]\n  clients: [3, 900]\n")
    words = [word for word in small if not word.startswith("clients=")]
    code, out, _ = fedlora("sweep", file, *words, "--dry-run")
    assert code == 1
    states = [line.split()[:4] for line in out.splitlines() if line.strip().startswith(("4   ", "400   "))]
    assert states == [
        ["4", "3", "to", "run"], ["4", "900", "cannot", "begin"],
        ["400", "3", "cannot", "begin"], ["400", "900", "cannot", "begin"],
    ]  # fmt: skip
    assert "cannot begin: lora.rank=4 clients=900: 400 training examples cannot give 900 clients" in out
    assert "cannot begin: lora.rank=400 clients=3: lora.rank=400 is above the smaller side" in out
    assert not list(home.sweeps().glob("checked-*"))


def test_where_no_run_can_begin_the_sweep_is_one_clear_line_and_leaves_nothing(fedlora, small, mine, store_uri):
    before = len(MlflowClient(store_uri).search_experiments())
    code, out, err = fedlora("sweep", mine, *small, "data.label=topic", "tracking.experiment=nothing")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "sweep listed: no run can begin; the first, fedit: " in err
    assert "no column 'topic' for the label" in err
    assert not list(home.sweeps().glob("listed-*"))
    assert len(MlflowClient(store_uri).search_experiments()) == before


@pytest.mark.parametrize("name", ["nope.yaml", "demoo"])
def test_a_sweep_that_is_not_there_is_told_before_anything_heavy_is_imported(name):
    code = (
        "import sys; from fedlora_cli import app as cli; sys.argv = ['fedlora', 'sweep', sys.argv[1]]\n"
        "try: cli.main()\n"
        "except SystemExit as end: print(end.code, [m for m in ('torch', 'prefect', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2 []\n"
    assert done.stderr.count("\n") == 1
    assert name in done.stderr


MISTAKES = {
    "pool": (["--pool", "cpu-wrokers"], "there is no work pool 'cpu-wrokers'", "prefect work-pool create"),
    "parallel": (["--parallel", "0"], "--parallel", "greater than or equal to 1"),
    "setting": (["lora.rnak=3"], "unknown key 'lora.rnak'", "Did you mean 'lora.rank'?"),
    "strategy": (["strategy=fedti"], "strategy='fedti'", "Did you mean 'fedit'?"),
    "option": (["--dryrun"], "No such option", "--dry-run"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(fedlora, small, mine, mistake, prefect_server):
    words, what, cure = MISTAKES[mistake]
    code, _, err = fedlora("sweep", mine, *small, *words)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert what in err
    assert cure in err


def test_an_experiment_that_was_deleted_is_one_clear_line(fedlora, small, mine, store_uri, prefect_server):
    client = MlflowClient(store_uri)
    client.delete_experiment(client.create_experiment("doomed"))
    code, _, err = fedlora("sweep", mine, *small, "tracking.experiment=doomed")
    assert code == 1
    assert err.count("\n") == 1
    assert "MLflow experiment 'doomed' was deleted; restore it" in err
