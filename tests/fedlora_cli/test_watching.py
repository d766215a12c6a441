"""Following a flow run: what it says of itself, and how it ended; nothing of its tasks."""

import sqlite3
from contextlib import closing

import pytest
from prefect import flow, runtime, settings
from prefect.client.orchestration import get_client
from prefect.utilities.names import generate_slug

from fedlora.errors import ConfigError, DataError, FedloraError
from fedlora_cli import watching
from tasks import names


@pytest.fixture
def follow(prefect_server):
    """`follow("a name")`: the lines that are shown."""

    def lines(what):
        shown = []
        watching.follow(what, shown.append)
        return shown

    return lines


def run_id(shown):
    return shown[0].rpartition("(")[2].rstrip(")")


def test_a_line_per_round_and_where_the_results_are(follow, run_flow):
    folder = run_flow({"name": "to be watched", "rounds": 1})
    shown = follow(None)  # what was asked for last
    assert shown[0].startswith("to be watched (")
    rounds = [line.split("  ", 1)[1] for line in shown if "accuracy" in line]
    assert [line.split("accuracy")[0].strip() for line in rounds] == ["before training", "round 1/1"]
    assert [line.split("  ", 1)[1].partition(":")[0] for line in shown[-2:]] == ["results", "folder"]
    assert shown[-1].endswith(f"folder: {folder.path}")
    assert follow(run_id(shown)) == shown
    assert not any("partition" in line or "Finished" in line or "Beginning" in line for line in shown)


def test_a_run_that_could_not_begin_says_why_once(follow, run_flow, tmp_path):
    with pytest.raises(DataError, match="no column 'topic'"):
        run_flow({"data.label": "topic"}, run_dir=tmp_path / "run")
    with get_client(sync_client=True) as client:
        run = next(each for each in client.read_flow_runs(limit=200) if "'topic'" in (each.state.message or ""))
    assert run.state.message.endswith("Set data.label to one of them")
    assert run.state.message.isprintable()  # the line, and no traceback
    with get_client(sync_client=True) as client:
        shown = []
        with pytest.raises(FedloraError, match=r"ended as Failed: .*no column 'topic' for the label"):
            watching.follow(str(run.id), shown.append)
        assert len(shown) == 1
        logged = client.read_logs(limit=200)
    assert not any("Traceback" in log.message for log in logged if log.flow_run_id == run.id)
    assert not (tmp_path / "run").exists()


@flow
def renamed(to):
    names.replace_generated(to)
    return runtime.flow_run.id


def test_the_name_with_which_prefect_created_a_run_still_finds_it(follow):
    """`prefect deployment run` has printed it."""
    drawn = generate_slug(2)
    run = renamed.with_options(flow_run_name=drawn)("a name of its own")
    assert follow(drawn) == follow("a name of its own") == [f"a name of its own ({run})"]


def test_a_name_that_somebody_chose_leaves_no_tag(follow):
    run = renamed.with_options(flow_run_name="chosen")("a name of its own")
    assert follow("chosen") == [f"chosen ({run})"]
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run).tags == []


def test_what_a_schedule_began_since_is_not_what_was_asked_for_last(follow):
    asked = renamed.with_options(flow_run_name="asked for")("")
    scheduled = renamed.with_options(flow_run_name="of a schedule")("")
    assert run_id(follow(None)) == scheduled
    database = settings.PREFECT_API_DATABASE_CONNECTION_URL.value().partition(":///")[2]
    with closing(sqlite3.connect(database)) as connection, connection:  # Prefect alone may say so in its API
        done = connection.execute("UPDATE flow_run SET auto_scheduled = 1 WHERE id = ?", [scheduled])
        assert done.rowcount == 1
    assert run_id(follow(None)) == asked


@pytest.mark.parametrize("what", ["nobody", "00000000-0000-4000-8000-000000000000"])
def test_a_flow_run_that_is_not_there(follow, what):
    with pytest.raises(ConfigError, match=f"no flow run '{what}'"):
        follow(what)
