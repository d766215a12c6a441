"""The flow on a real Prefect server and a real SQLite store: what is run, named, recorded, and left behind."""

import json
import os
import re
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from peft import PeftModel
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import TaskRun
from safetensors.torch import load_file

import fedlora
from deployments.shipped import PRESETS
from fedlora import metrics
from fedlora.config import configfile
from fedlora.data import tokens
from fedlora.data.batches import evaluation_batches
from fedlora.errors import ConfigError, DataError, RunAborted
from fedlora.run import jobs, loop, rounds
from fedlora.run.runfolder import RunFolder
from fedlora.run.server import Server
from fedlora.training import workers
from mlflow_tracking import tracker


def flow_run_of(folder: RunFolder) -> str:
    tracked = tracker.load(folder)
    return MlflowClient(tracked.uri).get_run(tracked.run).data.tags["prefect.flow_run_id"]


def task_names(flow_run: str) -> list[str]:
    with get_client(sync_client=True) as client:
        found: list[TaskRun] = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run])), limit=200
        )
        return [task.name for task in found]


EACH_ROUND = """
global/accuracy global/loss global/macro_f1
local/accuracy local/accuracy_p10 local/accuracy_worst gap/accuracy
bytes/up_adapter bytes/up_head bytes/down_adapter bytes/down_head bytes/down_base bytes/total
time/train_s time/read_s time/aggregate_s time/divergence_s time/evaluate_s time/round_s
"""
FROM_ROUND_ONE = """
rho/model rho/floor rho/excess rho/effective_clients abo/R abo/P abo/Q abo/dispersion
clients/selected clients/completed memory/client_bytes memory/server_bytes
"""


@pytest.fixture
def mlflow_run(finished_flow):
    tracked = tracker.load(finished_flow)
    return MlflowClient(tracked.uri).get_run(tracked.run)


def test_the_flow_gives_the_same_numbers_as_the_plain_loop(finished_flow, tiny, tmp_path):
    loop.train(configfile.load("demo", {**tiny, "strategy": "fedit"}, PRESETS), tmp_path / "loop")
    ours = load_file(finished_flow.path / "adapter" / "adapter_model.safetensors")
    plain = load_file(tmp_path / "loop" / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == plain.keys()
    assert all((ours[name] == plain[name]).all() for name in ours)
    for mine, theirs in zip(rounds.records(finished_flow), rounds.records(RunFolder(tmp_path / "loop")), strict=True):
        untimed = metrics.reproducible(mine.metrics)
        assert untimed.items() <= theirs.metrics.items()


def test_clients_of_several_ranks_on_a_base_that_changes(run_flow, tiny, tmp_path):
    """The flow as the plain loop; what padding does is logged once, in the first round whose clients differ in rank."""
    changes = {"strategy": "flora", "lora.ranks": {"low": 2, "high": 4, "share": 0.3}, "rounds": 3}
    folder = run_flow(changes)
    loop.train(configfile.load("demo", {**tiny, **changes}, PRESETS), tmp_path / "loop")
    name = "rounds/003/state.safetensors"
    assert (folder.path / name).read_bytes() == (tmp_path / "loop" / name).read_bytes()
    for mine, theirs in zip(rounds.records(folder), rounds.records(RunFolder(tmp_path / "loop")), strict=True):
        untimed = metrics.reproducible(mine.metrics)
        assert untimed.items() <= theirs.metrics.items()
    tracked, second = tracker.load(folder), rounds.records(folder)[2].metrics
    client = MlflowClient(tracked.uri)
    for name in ("ranks/before", "ranks/zero_padding", "ranks/replication"):
        points = [(point.step, point.value) for point in client.get_metric_history(tracked.run, name)]
        assert points == [(2, second[name])]
    base = [point.value for point in client.get_metric_history(tracked.run, "bytes/down_base")]
    assert [value > 0 for value in base] == [False, False, True, True]


def clients_in(name):
    """The clients that a task run's name tells."""
    for each in name.split()[3].split(","):
        first, _, last = each.partition("–")
        yield from range(int(first), int(last or first) + 1)


def test_task_runs_say_strategy_round_and_client(finished_flow):
    names = task_names(flow_run_of(finished_flow))
    for number in (1, 2):
        trained = [name for name in names if re.fullmatch(rf"round {number} clients? \S+ fine-tune", name)]
        assert sorted(client for name in trained for client in clients_in(name)) == [0, 1, 2]
        assert f"round {number} aggregate" in names
        assert f"round {number} part 0 evaluate" in names
        assert f"round {number} track" in names
    assert {"partition", "initialise", "round 0 track", "publish"} <= set(names)


def test_clients_that_take_little_time_share_task_runs(run_flow):
    """What Prefect costs grows with groups, not with clients; with `runner.group_s=0` each has its own."""
    for group_s, most in ((60, 7), (0, 12)):
        folder = run_flow({"clients": 12, "partition.name": "iid", "runner.group_s": group_s})
        for number in (1, 2):
            called = rf"round {number} clients? \S+ fine-tune"
            trained = [name for name in task_names(flow_run_of(folder)) if re.fullmatch(called, name)]
            assert sorted(client for name in trained for client in clients_in(name)) == list(range(12))
            assert len(trained) <= most
            assert len(trained) == 12 or group_s


def test_progress_and_summary_artifacts(finished_flow):
    flow_run = flow_run_of(finished_flow)
    with get_client(sync_client=True) as client:
        found = {a.key: a for a in client.read_artifacts() if str(a.flow_run_id) == flow_run}
    assert float(found["federated-progress"].data) == 100.0
    summary = found["federated-summary"].data
    tracked = tracker.load(finished_flow)
    assert f"/runs/{tracked.run}" in summary
    assert summary.count("\n| ") == 3 + 1  # a header and rounds 0, 1, 2


def test_every_metric_of_the_design_is_logged_at_every_round(mlflow_run, finished_flow):
    client = MlflowClient(tracker.load(finished_flow).uri)
    for name in EACH_ROUND.split():
        assert [point.step for point in client.get_metric_history(mlflow_run.info.run_id, name)] == [0, 1, 2], name
    for name in FROM_ROUND_ONE.split():
        assert [point.step for point in client.get_metric_history(mlflow_run.info.run_id, name)] == [1, 2], name
    finals = {name for name in mlflow_run.data.metrics if name.startswith("final/")}
    assert {"final/accuracy", "final/macro_f1", "final/rho", "final/bytes", "final/seconds"} <= finals
    assert mlflow_run.data.metrics["final/accuracy"] == mlflow_run.data.metrics["global/accuracy"]


def test_tags_params_data_and_artifacts(mlflow_run, finished_flow):
    tags, params = mlflow_run.data.tags, mlflow_run.data.params
    partition = json.loads((finished_flow.path / "partition.json").read_text())
    assert tags["strategy"] == "fedit"
    assert tags["partition.hash"] == partition["hash"]
    assert tags["mlflow.runColor"].startswith("#")
    assert params["seed"] == "0"
    assert params["lora.rank"] == "8"
    assert mlflow_run.inputs.dataset_inputs[0].dataset.name == "wordnet-nouns"
    client = MlflowClient(tracker.load(finished_flow).uri)

    def listed(folder=""):
        return {entry.path for entry in client.list_artifacts(mlflow_run.info.run_id, folder)}

    assert {"adapter", "config.yaml", "partition.json", "tables", "figures"} <= listed()
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/README.md"} <= listed(
        "adapter"
    )
    assert {"adapter/round-001", "adapter/round-002"} <= listed("adapter")
    assert listed("tables") == {"tables/divergence.json", "tables/clients.json"}
    assert {"figures/partition.png", "figures/rounds.png"} <= listed("figures")


def test_the_logged_adapter_loads_with_peft_and_reproduces_the_logged_accuracy(mlflow_run, finished_flow, tmp_path):
    client = MlflowClient(tracker.load(finished_flow).uri)
    folder = client.download_artifacts(mlflow_run.info.run_id, "adapter", str(tmp_path))
    setup = finished_flow.need_json("setup.json")
    model = PeftModel.from_pretrained(fedlora.load_base("bert-tiny", setup["labels"]), folder).eval()
    data = tokens.open_tokens(Path(setup["tokens"]))
    examples = tokens.examples(data.test, range(len(data.test)))
    right = sum(
        int((model(**batch.model_inputs()).logits.argmax(-1) == batch.labels).sum())
        for batch in evaluation_batches(examples, 7, data.padding)
    )
    assert right / len(data.test) == pytest.approx(mlflow_run.data.metrics["final/accuracy"], abs=1e-12)


def test_running_again_in_the_same_folder_adds_nothing(finished_flow, run_flow, mlflow_run):
    client = MlflowClient(tracker.load(finished_flow).uri)
    before = client.get_metric_history(mlflow_run.info.run_id, "global/accuracy")
    ended = client.get_run(mlflow_run.info.run_id).info.end_time
    run_flow({"strategy": "fedit", "tracking.adapter_every": 1}, run_dir=finished_flow.path)
    after = client.get_metric_history(mlflow_run.info.run_id, "global/accuracy")
    assert [(p.step, p.value, p.timestamp) for p in after] == [(p.step, p.value, p.timestamp) for p in before]
    assert client.get_run(mlflow_run.info.run_id).info.status == "FINISHED"
    assert client.get_run(mlflow_run.info.run_id).info.end_time == ended


def test_mlflow_is_opened_after_the_first_score_while_clients_train(run_flow, monkeypatch):
    """Seconds that a person who waits for it need not wait."""
    seen = []
    for owner, name in ((jobs, "fine_tune"), (tracker, "start"), (Server, "close")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, real=real, **k: (seen.append(name), real(*a, **k))[1])
    run_flow({"strategy": "svd", "rounds": 1, "runner.kind": "threads", "runner.slots": 1})
    assert seen.index("close") < seen.index("start") < len(seen) - 1 - seen[::-1].index("fine_tune")


def test_what_fails_before_there_is_a_score_is_in_mlflow_too(run_flow, monkeypatch, tmp_path):
    monkeypatch.setattr("flows.checks.of_run", lambda config, folder: None)
    with pytest.raises(DataError, match="there is no file or folder"):
        run_flow({"data.name": str(tmp_path / "nowhere.csv"), "data.text": "text"}, run_dir=tmp_path / "run")
    tracked = tracker.load(RunFolder(tmp_path / "run"))
    assert MlflowClient(tracked.uri).get_run(tracked.run).info.status == "FAILED"


def die_once(bench, folder, number, client_id, attempt, needed):
    """A client's job whose worker process is killed the first time that client 1 trains."""
    mark = folder / "died"
    if client_id == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return jobs.fine_tune(bench, folder, number, client_id, attempt, needed)


def test_a_dead_worker_is_replaced_and_the_client_tried_again(run_flow, finished_flow, monkeypatch):
    real = workers.ProcessSlot.run_within
    monkeypatch.setattr(
        workers.ProcessSlot,
        "run_within",
        lambda slot, seconds, job, *a: real(slot, seconds, die_once if job is jobs.fine_tune else job, *a),
    )
    folder = run_flow({"strategy": "fedit", "runner.kind": "processes", "runner.slots": 1})
    assert (folder.path / "died").exists()
    mine, theirs = (load_file(f.path / "adapter" / "adapter_model.safetensors") for f in (folder, finished_flow))
    assert all((mine[name] == theirs[name]).all() for name in theirs)


def test_a_run_that_fails_is_marked_failed_and_names_client_round_and_cure(run_flow, tmp_path):
    with pytest.raises(RunAborted, match=r"client \d, round 1: the loss is .*lower training.learning_rate"):
        run_flow({"training.learning_rate": 1e30, "training.max_grad_norm": None}, run_dir=tmp_path / "run")
    tracked = tracker.load(RunFolder(tmp_path / "run"))
    assert MlflowClient(tracked.uri).get_run(tracked.run).info.status == "FAILED"


def test_a_run_that_is_interrupted_is_marked_killed_and_can_be_continued(
    run_flow, finished_flow, monkeypatch, tmp_path
):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fedlora.run.participation.next_ask", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_flow({"strategy": "fedit"}, run_dir=tmp_path / "run")
    tracked = tracker.load(RunFolder(tmp_path / "run"))
    assert MlflowClient(tracked.uri).get_run(tracked.run).info.status == "KILLED"
    folder = run_flow({"strategy": "fedit"}, run_dir=tmp_path / "run")
    assert tracker.load(folder).run == tracked.run
    assert MlflowClient(tracked.uri).get_run(tracked.run).info.status == "FINISHED"
    same = rounds.records(folder)[-1].metrics["global/loss"]
    assert same == rounds.records(finished_flow)[-1].metrics["global/loss"]


def test_flat_parameters_change_that_value_and_nothing_else(run_flow, tiny):
    changed = run_flow({}, strategy="ffa-lora", rounds=1, seed=3).config
    plain = run_flow({"rounds": 1}).config
    assert (changed.strategy, changed.rounds, changed.seed) == ("ffa-lora", 1, 3)
    assert changed.model_copy(update={"strategy": "fedit", "seed": 0}) == plain


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"strategy": "flora-nna"}, ConfigError, "Did you mean 'flora-na'"),
        ({"data.name": "wordnet-noun"}, DataError, "wordnet-nouns"),
        ({"partition.min_size": 300}, DataError, "min_size"),
    ],
)
def test_bad_settings_end_the_flow_with_one_line(run_flow, changes, error, message):
    with pytest.raises(error, match=message) as raised:
        run_flow(changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("when", ["taken", "given back"])
def test_a_device_that_is_once_not_to_be_had_costs_no_client(run_flow, monkeypatch, when):
    """A group is tried again, and finds what is done."""
    trained, failed = [], []
    real = jobs.fine_tune

    @contextmanager
    def held(runner, device):
        if when == "taken" and not failed:
            failed.append(1)
            raise RuntimeError("the server says 500")
        yield
        if not failed:
            failed.append(1)
            raise RuntimeError("the server says 500")

    def fine_tune(bench, folder, number, client, attempt, needed):
        worked = real(bench, folder, number, client, attempt, needed)
        trained.extend([(number, client)] * worked)
        return worked

    monkeypatch.setattr("tasks.federated.held", held)
    monkeypatch.setattr(jobs, "fine_tune", fine_tune)
    run_flow({"rounds": 1, "runner.kind": "threads", "runner.slots": 1})
    assert failed
    assert sorted(trained) == [(1, 0), (1, 1), (1, 2)]
