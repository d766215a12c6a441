"""The command line as a user meets it: what it prints, what it returns, and one clear line for each mistake."""

import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from uuid import UUID

import pytest
from mlflow import MlflowClient
from prefect.client.orchestration import get_client

from fedlora.files import home
from fedlora.run import jobs

FEDLORA = str(Path(sys.executable).with_name("fedlora"))


def test_run_prints_progress_table_and_where_to_look(fedlora, small, prefect_server, tmp_path):
    code, out, err = fedlora("run", "demo", *small, "strategy=flora-na", "--run-dir", tmp_path / "run")
    assert (code, err.count("Traceback")) == (0, 0)
    assert "before training" in out
    assert "round 2/2" in out
    row = next(line for line in out.splitlines() if line.strip().startswith("flora-na "))
    assert len(row.split()) == 10
    assert f"adapter           {tmp_path / 'run' / 'adapter'}" in out
    assert "MLflow            http://127.0.0.1" in out
    assert "\x1b[" not in out  # no colours or cursor movements in a file
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    flow_run = re.search(r"^Prefect           http\S+/runs/flow-run/(\S+)$", out, flags=re.M)[1]
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(UUID(flow_run))
    assert (found.name, found.parameters["run_dir"]) == ("flora-na seed 0", str(tmp_path / "run"))


MISTAKES = {
    "strategy": (["strategy=fedti"], "strategy='fedti' is not allowed", "Did you mean 'fedit'?"),
    "key": (["lora.rnak=4"], "unknown key 'lora.rnak'", "Did you mean 'lora.rank'?"),
    "value": (["partition.name=dirichlett"], "allowed: iid, dirichlet", "Did you mean 'dirichlet'?"),
    "no number": (["rounds=many"], "rounds='many'", "integer"),
    "preset": (["deom"], "unknown preset 'deom'", "Did you mean 'demo'?"),
    "data set": (["data.name=wordnet-noun"], "data.name='wordnet-noun'", "wordnet-nouns"),
    "model": (["model.name=bert-tinny"], "model.name=bert-tinny: no such model", "Did you mean 'bert-tiny'?"),
    "alpha": (["lora.alpha=0"], "lora.alpha=0 is not allowed", "greater than 0"),
    "steps and epochs": (
        ["training.local_steps=2", "training.local_epochs=1"], "exactly one of local_steps and local_epochs", "leave",
    ),
    "natural owner": (["partition.name=natural-id"], "needs data.client", "column"),
    "option": (["strategy_options.sweeps=3"], "strategy_options.sweeps=3", "Options: none"),
    "device": (["runner.device=cuda:9"], "runner.device=cuda:9", "use runner.device=cpu"),
    "rank": (["lora.rank=200"], "lora.rank=200 is above the smaller side of module", "at most 128"),
    "target": (["lora.target_modules=quarry"], "'quarry' matches no linear layer", "Did you mean 'query'?"),
    "too many clients": (["clients=900"], "400", "clients"),
    "tracking server": (["tracking.uri=http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer", "fedlora up"),
    "tracking folder": (["tracking.uri=mlruns"], "tracking.uri=mlruns: expected", "sqlite"),
    "no value": (["rounds"], "unknown preset 'rounds'", "demo"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_a_non_zero_exit(fedlora, small, prefect_server, mistake, tmp_path):
    words, what, cure = MISTAKES[mistake]
    preset = [] if "=" not in words[0] else ["demo"]
    code, _, err = fedlora("run", *preset, *([] if not preset else small), *words, "--run-dir", tmp_path / "run")
    assert code != 0
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert what in err
    assert cure in err
    assert not (tmp_path / "run").exists()


BAD_FILES = {
    "no text column": ({"text": None}, "text", "label"),
    "no label column": ({"label": None}, "label", "text"),
    "one class": ({"label": "a"}, "class", "'a'"),
    "a missing label": ({"label": ["a", None] * 30}, "label", "30"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_data_that_cannot_be_used_is_one_clear_line(
    fedlora, small, prefect_server, store_uri, fault, labelled, tmp_path
):
    """And leaves nothing behind: no run folder, no run in MLflow, no flow run."""
    columns, *words = BAD_FILES[fault]
    file = labelled(tmp_path / "mine.csv", **columns)
    sizes = ["data.train_size=null", "data.test_size=null"]
    before = recorded(store_uri)
    code, _, err = fedlora("run", "demo", *small, *sizes, f"data.name={file}", "--run-dir", tmp_path / "run")
    assert code == 2
    assert err.count("\n") == 1
    assert all(word in err for word in words)
    assert not (tmp_path / "run").exists()
    assert recorded(store_uri) == before


def recorded(store_uri):
    """How many runs MLflow has, and how many flow runs Prefect."""
    client = MlflowClient(store_uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    with get_client(sync_client=True) as prefect:
        return len(runs), len(prefect.read_flow_runs(limit=200))


@pytest.mark.parametrize("words", [["lora.rank=200"], ["tracking.experiment=thrown-out"], ["clients=900"], []])
def test_a_check_starts_nothing(fedlora, small, prefect_server, store_uri, words, tmp_path):
    client = MlflowClient(store_uri)
    if not client.get_experiment_by_name("thrown-out"):
        client.delete_experiment(client.create_experiment("thrown-out"))
    before = recorded(store_uri)
    code, out, err = fedlora("run", "demo", *small, *words, "--check", "--run-dir", tmp_path / "run")
    assert code == (2 if words and "experiment" not in words[0] else len(words))
    if words:
        assert (out, err.count("\n")) == ("", 1)
    else:
        assert out.startswith("OK: fedit on wordnet-nouns, 20 labels, 400 + 60 examples, 3 clients with ")
        assert (err, out.count("\n")) == ("", 1)
    assert not (tmp_path / "run").exists()
    assert recorded(store_uri) == before


def test_a_folder_that_cannot_be_written_is_one_clear_line(fedlora, small, prefect_server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = fedlora("run", "demo", *small, "--run-dir", tmp_path / "file" / "run")
    assert code != 0
    assert f"cannot write {tmp_path / 'file' / 'run'}" in err
    assert err.count("\n") == 1


def test_a_prefect_server_that_does_not_answer_is_one_clear_line(small, tmp_path):
    environ = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = subprocess.run(
        [FEDLORA, "run", "demo", *small], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "Prefect server at http://127.0.0.1:9/api does not answer" in done.stderr
    assert "unset PREFECT_API_URL" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: x\ngrid:\n  strategy: []\n", "grid.strategy is an empty list"),
        ("name: x\ngrid:\n  seed: [1, 1]\n", "grid.seed has a value twice"),
        ("name: x\ngird:\n  seed: [1]\n", "Did you mean 'grid'?"),
        ("name: x\ngrid: {lora.rnk: [1]}\n", "Did you mean 'lora.rank'?"),
        ("name: x\ngrid:\n  seed: [1\n", "line 4"),
    ],
)
def test_a_wrong_sweep_file_is_one_clear_line(fedlora, tmp_path, content, words):
    file = tmp_path / "x.yaml"
    file.write_text(content)
    code, _, err = fedlora("sweep", file)
    assert code == 2
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("strategies", ["fedit", "ffa-lora", "flora-na", "svd", "local", "replication", "ravan"]),
        ("datasets", ["wordnet-nouns", "wordnet-definitions", "newsgroups-20", "fancyzhx/ag_news"]),
        ("models", ["bert-tiny", "minilm", "sentence-transformers/all-MiniLM-L6-v2"]),
    ],
)
def test_lists(fedlora, command, words):
    code, out, _ = fedlora(command)
    assert code == 0
    assert all(word in out for word in words)


def test_sums_are_written_to_a_file_once(fedlora, tmp_path, monkeypatch):
    """Of a package with as many questions as its one task has; tests/fedlora/data/test_maths.py has the real one."""
    sums = [{"question": f"{n % 150} + 1 = ", "answer": str(n % 150 + 1), "metadata": {}} for n in range(200)]
    gym = ModuleType("reasoning_gym")
    gym.create_dataset = lambda task, size, seed: sums[:size]
    gym.factory = ModuleType("reasoning_gym.factory")
    gym.factory.DATASETS = {"chain_sum": None}
    for module in (gym, gym.factory):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    words = ("datasets", "make", "--task", "chain_sum", "--size", 200, "--out", tmp_path / "s.jsonl")
    code, out, _ = fedlora(*words)
    assert code == 0
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 150
    assert "(150 problems)" in out
    assert "left out          50 questions that had been asked before" in out
    code, _, err = fedlora(*words)
    assert (code, err.count("\n")) == (2, 1)


def test_all_about_one_strategy(fedlora):
    code, out, _ = fedlora("strategies", "flora-na")
    assert code == 0
    for words in ("arXiv 2509.26399", "strategy_options.solver=als", "alternating least squares", "r*(d_out + d_in)"):
        assert words in out
    code, _, err = fedlora("strategies", "flora_na")
    assert code == 2
    assert "Did you mean 'flora-na'" in err


def test_help_imports_nothing_heavy():
    """Help must come at once; what costs seconds is imported by the commands that need it."""
    code = "import sys; sys.argv = ['fedlora', 'run', '--help']\ntry:\n from fedlora_cli.app import main; main()\n"
    code += "except SystemExit: pass\nprint([m for m in ('torch', 'prefect', 'mlflow', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "KEY=VALUE" in done.stdout
    assert done.stdout.rstrip().endswith("[]")


@pytest.fixture(scope="module")
def bare_home(with_databases, tmp_path_factory):
    """A home without servers, alone in its folder, whose name has all that an address could mistake."""
    folder = tmp_path_factory.mktemp("bare") / "home? #1 100% feature%2Fx ρ"
    folder.mkdir()
    return with_databases(folder)


@pytest.mark.parametrize("stop", [pytest.param("ctrl-c", marks=pytest.mark.system), "sigterm"])
def test_without_a_server_and_stopped(small, bare_home, tmp_path, stop):
    """A process with a home of its own and no server, interrupted as a terminal does it (the whole process group), or
    as a service manager does; where proxies lead nowhere, and output is not UTF-8."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    environ |= {"FEDLORA_HOME": str(bare_home), "PYTHONIOENCODING": "latin-1", "NO_PROXY": "example.org"}
    environ |= {"http_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "127.0.0.1:9", "ALL_PROXY": "socks://127.0.0.1:9"}
    words = [FEDLORA, "run", "demo", *small, "rounds=200", "--run-dir", str(tmp_path / "run")]
    words = [word for word in words if not word.startswith(("tracking.", "runner."))] + ["runner.slots=1"]
    process = subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, encoding="latin-1", start_new_session=True)  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "round 2/200" in line:
            os.killpg(process.pid, signal.SIGINT) if stop == "ctrl-c" else process.terminate()
    assert process.wait(timeout=60) == 130, "".join(lines)
    assert "Traceback" not in "".join(lines)
    assert "resource_tracker" not in "".join(lines)
    assert f"fedlora resume {tmp_path / 'run'}" in lines[-1]
    runs = MlflowClient(home.sqlite_url(bare_home / "mlflow.db")).search_runs(["1"])
    assert {run.info.status for run in runs} == {"KILLED"}
    assert flow_run_states(bare_home) == {"Cancelled"}
    assert any("rho 0." in line for line in lines)
    assert [path.name for path in bare_home.parent.iterdir()] == [bare_home.name]


def flow_run_states(folder: Path) -> set[str]:
    import sqlite3

    for _ in range(50):  # the server writes on as it ends
        with sqlite3.connect(folder / "prefect.db") as database:
            states = {state for (state,) in database.execute("select state_name from flow_run")}
        if states == {"Cancelled"}:
            break
        time.sleep(0.2)
    return states


def test_a_started_prefect_server_is_used(fedlora, small, prefect_server, tmp_path):
    code, _, _ = fedlora("run", "demo", *small, "name=on a server", "rounds=1", "--run-dir", tmp_path / "run")
    assert code == 0
    with get_client(sync_client=True) as client:
        found = [run for run in client.read_flow_runs(limit=200) if run.name == "on a server"]
    assert [run.state.name for run in found] == ["Completed"]


def test_settings_are_in_place_before_prefect_is_imported():
    """Prefect reads its settings once, at import; telemetry and result storage would otherwise be its own defaults."""
    code = """
import sys
from deployments.local import environment
from fedlora_cli import app as cli

real = environment.prepare

def prepare(*how):
    print("prefect" in sys.modules)
    real(*how)

environment.prepare = prepare
for words in (["run", "lora.rank=0"], ["sweep", "nothere"], ["up", "--help"], ["down", "--help"]):
    sys.argv = ["fedlora", *words]
    print(words[0])
    try:
        cli.main()
    except SystemExit:
        pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    lines = done.stdout.splitlines()
    after = [lines[lines.index(command) + 1] for command in ("run", "sweep", "up", "down")]
    assert after[:2] == ["False", "False"]  # later calls, as flows are imported, change nothing
    assert "True" not in after


def test_data_that_fails_leaves_no_run_running(
    fedlora, small, prefect_server, labelled, tmp_path, store_uri, monkeypatch
):
    """After the check of it: the file is another by the time that the run reads it."""
    file = labelled(tmp_path / "mine.csv")
    words = ["data.train_size=null", "data.test_size=null", f"data.name={file}", "tracking.experiment=failing"]
    real = jobs.check_length
    monkeypatch.setattr(jobs, "check_length", lambda *a: (labelled(file, label="a"), real(*a)))
    code, _, err = fedlora("run", "demo", *small, *words, "--run-dir", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "has one class only" in err
    client = MlflowClient(store_uri)
    runs = client.search_runs([client.get_experiment_by_name("failing").experiment_id])
    assert [run.info.status for run in runs] == ["FAILED"]


def test_a_broken_plugin_spares_the_list(fedlora, monkeypatch):
    from fedlora.strategies import registry

    known = registry._locations()
    monkeypatch.setattr(registry, "_locations", lambda: {**known, "gone": "no_such_module_anywhere:Gone"})
    code, out, _ = fedlora("strategies")
    assert code == 0
    assert "fedit" in out
    assert "not usable: strategy 'gone' comes from a plug-in that cannot be loaded: No module named" in out


def test_the_version_is_told(fedlora):
    assert fedlora("--version") == (0, f"fedlora {version('fedlora')}\n", "")
