"""What a real Prefect server does by itself: plan and start what is scheduled, mark runs that are late, give up a run
whose process was killed, tell how a sweep ended, tidy up. It is the one of `test_services.py`, and its services are due
every second or two."""

from __future__ import annotations

import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psutil
import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed
from standins import HOOK, Live, eventually

from deployments.local import automations, environment, planning, processes, server_log, standing
from deployments.local.environment import Services
from deployments.local.processes import ServiceError
from deployments.states import REGRESSION
from fedlora.config import RunConfig
from fedlora.files import home
from flows.federated import default_folder

Send = Callable[[str, str, dict[str, Any]], Any]


@pytest.fixture(scope="module")
def live(live: Live) -> Iterator[tuple[Services, list[str]]]:
    with temporary_settings({PREFECT_API_URL: live.services.prefect_url}):
        yield live.services, live.said


def test_a_busy_run_may_skip_heartbeats() -> None:
    every = int(environment.defaults()["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    assert timedelta(seconds=3 * every) <= automations.SILENT_FOR


def test_where_nobody_wants_to_know_nobody_is_told(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """First: afterwards another server is the one that is asked."""
    monkeypatch.delenv(automations.NOTIFY_URL, raising=False)
    assert list(automations.apply()) == [automations.crashed_without_heartbeat().name]


def deployment(live: tuple[Services, list[str]], name: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{live[0].prefect_url}/deployments/name/{name}", timeout=30).json()
    return found


def states(live: tuple[Services, list[str]], send: Send, chosen: dict[str, Any], kind: str = "flow") -> list[str]:
    """Names of the states of chosen runs."""
    return [each["state"]["name"] for each in send("POST", f"{live[0].prefect_url}/{kind}_runs/filter", chosen)]


def of_deployment(id: str) -> dict[str, Any]:
    return {"flow_runs": {"deployment_id": {"any_": [id]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 200}


def test_up_returns_when_the_runs_of_a_cron_are_planned(servers: Live) -> None:
    """Asked once: `up` has waited. A release of SQLAlchemy or Prefect under which nothing is planned ends here."""
    runs = servers.planned
    assert len(runs) >= 3
    assert {each["state"]["name"] for each in runs} == {"Scheduled"}
    assert all(each["auto_scheduled"] and "T02:00:00" in each["expected_start_time"] for each in runs)
    folders = set()
    for each in runs:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", each["id"])
            folders.add(default_folder(RunConfig()))
    assert len(folders) == len(runs)  # the second night does not find the first one's run and call it finished


def test_runs_that_are_missing_are_planned_again(live: tuple[Services, list[str]], send: Send) -> None:
    """By the scheduler's main loop: the other one looks only at deployments of the last seconds."""
    chosen = of_deployment(deployment(live, "federated/nightly")["id"])
    old = {each["id"] for each in send("POST", f"{live[0].prefect_url}/flow_runs/filter", chosen)}
    time.sleep(4)
    for each in old:
        send("DELETE", f"{live[0].prefect_url}/flow_runs/{each}", None)

    def planned() -> set[str]:
        return {each["id"] for each in send("POST", f"{live[0].prefect_url}/flow_runs/filter", chosen)}

    assert eventually(lambda: len(planned() - old) >= 3)


def test_a_schedule_fires_and_its_run_completes(live: tuple[Services, list[str]], send: Send) -> None:
    soon = deployment(live, "tick/soon")
    schedule = f"{live[0].prefect_url}/deployments/{soon['id']}/schedules/{soon['schedules'][0]['id']}"
    send("PATCH", schedule, {"active": True})
    try:
        assert eventually(lambda: "Completed" in states(live, send, of_deployment(soon["id"])))
    finally:
        send("PATCH", schedule, {"active": False})
    runs = send("POST", f"{live[0].prefect_url}/flow_runs/filter", of_deployment(soon["id"]))
    fired = next(each for each in runs if each["state"]["name"] == "Completed")
    assert fired["auto_scheduled"]
    assert fired["start_time"] >= fired["expected_start_time"]
    of_fired = {"flow_runs": {"id": {"any_": [fired["id"]]}}}
    assert eventually(lambda: states(live, send, of_fired, "task") == ["Completed"])  # recorded from its events


def test_a_run_that_nobody_takes_is_late_and_the_status_says_why(live: tuple[Services, list[str]], send: Send) -> None:
    unserved = deployment(live, "tick/unserved")
    run = send("POST", f"{live[0].prefect_url}/deployments/{unserved['id']}/create_flow_run", {})
    assert eventually(lambda: states(live, send, of_deployment(unserved["id"])) == ["Late"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", live[0].prefect_url)
        found = standing.look()
    assert [each.state for each in found.servers] == ["running"] * 3
    pools = {each.name: each for each in found.pools}
    assert (pools["gpu-workers"].waiting, pools["gpu-workers"].workers, pools["gpu-workers"].stuck) == (1, [], True)
    assert len(pools["cpu-workers"].workers) == 1
    assert [each.deployment for each in found.schedules if each.at] == ["federated/nightly"]
    assert not found.well
    send("DELETE", f"{live[0].prefect_url}/flow_runs/{run['id']}", None)


def running(live: tuple[Services, list[str]], send: Send) -> str:
    """The id of a run that says that it runs."""
    flow_id = deployment(live, "tick/unserved")["flow_id"]
    body = {"flow_id": flow_id, "state": {"type": "RUNNING", "name": "Running"}}
    return str(send("POST", f"{live[0].prefect_url}/flow_runs/", body)["id"])


def set_state(live: tuple[Services, list[str]], send: Send, run: str, state: dict[str, Any]) -> None:
    send("POST", f"{live[0].prefect_url}/flow_runs/{run}/set_state", {"state": state, "force": True})


def test_a_pause_ends_and_tasks_of_a_cancelled_run_are_cancelled(live: tuple[Services, list[str]], send: Send) -> None:
    paused, cancelled = running(live, send), running(live, send)
    task = {"flow_run_id": cancelled, "task_key": "train", "dynamic_key": "0", "state": {"type": "RUNNING"}}
    send("POST", f"{live[0].prefect_url}/task_runs/", task)
    over = {"pause_timeout": "2026-01-01T00:00:00Z"}
    set_state(live, send, paused, {"type": "PAUSED", "name": "Paused", "state_details": over})
    set_state(live, send, cancelled, {"type": "CANCELLED", "name": "Cancelled"})
    one, other = ({"flow_runs": {"id": {"any_": [each]}}} for each in (paused, cancelled))
    assert eventually(lambda: states(live, send, one) == ["Failed"])
    assert eventually(lambda: states(live, send, other, "task") == ["Cancelled"])


def test_old_events_and_the_logs_of_runs_that_are_gone_are_removed(
    live: tuple[Services, list[str]], send: Send
) -> None:
    api, run = live[0].prefect_url, running(live, send)
    kept, old = ({"occurred": occurred, "event": "fedlora.tests", "id": str(uuid.uuid4())} for occurred in _days(0, 30))
    for event in (kept, old):
        event |= {"resource": {"prefect.resource.id": "fedlora.tests"}, "related": [], "payload": {}}  # type: ignore[dict-item]
    send("POST", f"{api}/events", [kept, old])
    log = {"name": "a logger", "level": 20, "message": "a line", "timestamp": kept["occurred"], "flow_run_id": run}
    send("POST", f"{api}/logs/", [log])
    chosen_events = {"filter": {"occurred": {"since": _days(60)[0]}, "event": {"name": ["fedlora.tests"]}}}
    chosen_logs = {"logs": {"flow_run_id": {"any_": [run]}}}
    assert eventually(lambda: len(send("POST", f"{api}/logs/filter", chosen_logs)) == 1)
    send("DELETE", f"{api}/flow_runs/{run}", None)
    assert eventually(lambda: not send("POST", f"{api}/logs/filter", chosen_logs))

    def left() -> list[str]:
        return [each["id"] for each in send("POST", f"{api}/events/filter", chosen_events)["events"]]

    assert eventually(lambda: left() == [kept["id"]])


def _days(*ago: int) -> list[str]:
    return [(datetime.now(UTC) - timedelta(days=days)).isoformat() for days in ago]


def test_a_second_time_changes_nothing_and_switched_off_stays_off(live: tuple[Services, list[str]], send: Send) -> None:
    services, _ = live
    names = {each["name"]: each for each in send("POST", f"{services.prefect_url}/automations/filter", {})}
    assert len(names) == 2  # `up` made them
    assert set(automations.apply().values()) == {"unchanged"}
    crash = automations.crashed_without_heartbeat().name
    page = f"{services.prefect_url}/automations/{names[crash]['id']}"
    send("PATCH", page, {"enabled": False})
    assert automations.apply(timedelta(seconds=10))[crash] == "updated"
    after = {each["name"]: each for each in send("POST", f"{services.prefect_url}/automations/filter", {})}
    assert {name: each["id"] for name, each in after.items()} == {name: each["id"] for name, each in names.items()}
    assert not after[crash]["enabled"]
    send("PATCH", page, {"enabled": True})


def test_a_sweep_that_fails_is_told_and_the_address_stays_secret(
    live: tuple[Services, list[str]], servers: Live
) -> None:
    services, said = live
    heard = servers.listener.heard

    @flow(name="sweep", flow_run_name='sweep "quoted"')
    def sweep() -> None:
        raise ValueError("no cell finished")

    @flow(name="sweep", flow_run_name="sweep nightly")
    def fell() -> Any:
        return Completed(name=REGRESSION, message='"svd" fell', data="folder")

    @flow(name="federated")
    def other() -> None:
        return

    other()
    with pytest.raises(ValueError, match="no cell finished"):
        sweep()
    assert eventually(lambda: bool(heard))
    path, told = heard[0]
    assert path == HOOK
    assert told["state"] == "Failed"
    assert told["flow_run"] == 'sweep "quoted"'
    assert told["url"].startswith(services.prefect_url.removesuffix("/api"))
    assert told["text"].startswith("sweep 'sweep \"quoted\"' ended: Failed. http")
    assert told["message"] == ""  # what went wrong is for those who may see the server
    assert len(heard) == 1  # a single run is nobody's business
    assert fell() == "folder"
    assert eventually(lambda: len(heard) == 2)
    told = heard[1][1]
    assert (told["state"], told["message"]) == ("Regression", '"svd" fell')
    assert told["text"].startswith("sweep 'sweep nightly' ended: Regression. \"svd\" fell. http")
    assert not any(HOOK in line for line in said)
    files = [path for path in home.home().rglob("*") if path.is_file()]
    assert not [path for path in files if HOOK.encode() in path.read_bytes()]
    for _, (pid, _) in services.processes.items():
        assert automations.NOTIFY_URL not in psutil.Process(pid).environ()


def test_a_run_whose_process_and_worker_are_killed_becomes_crashed(
    live: tuple[Services, list[str]], send: Send
) -> None:
    """Last but one: nobody works here afterwards."""
    services, _ = live
    automations.apply(timedelta(seconds=10))
    custom = deployment(live, "federated/custom")
    run = send("POST", f"{services.prefect_url}/deployments/{custom['id']}/create_flow_run", {})
    heartbeat = {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}}}
    resource = f"prefect.flow-run.{run['id']}"

    def has_sent_one() -> bool:
        events = send("POST", f"{services.prefect_url}/events/filter", heartbeat)["events"]
        return any(each["resource"]["prefect.resource.id"] == resource for each in events)

    assert eventually(has_sent_one)
    worker = psutil.Process(services.processes["worker"][0])
    for process in [worker, *worker.children(recursive=True)]:
        process.kill()

    def state() -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{services.prefect_url}/flow_runs/{run['id']}", timeout=30).json()["state"]
        return found

    assert eventually(lambda: state()["type"] == "CRASHED"), state()
    assert "no heartbeat for 10 s" in state()["message"]

    def workers() -> list[str]:
        found = send("POST", f"{services.prefect_url}/work_pools/cpu-workers/workers/filter", {})
        return [each["status"] for each in found]

    assert eventually(lambda: workers() == ["OFFLINE"])
    assert httpx.get(f"{services.prefect_url}/work_pools/cpu-workers", timeout=30).json()["status"] == "NOT_READY"
    assert [each.state for each in standing.look().servers] == ["running", "running", "stopped"]


def test_no_service_of_that_server_has_failed(live: tuple[Services, list[str]]) -> None:
    """Whatever else it runs: the last of these tests. A lock that was not got in time is no fault."""
    failed = server_log.failures(processes.log_file("prefect"))
    assert [each for each in failed if not each.passing] == []


def test_a_scheduler_that_cannot_write_is_named_with_its_line(
    live: tuple[Services, list[str]], servers: Live, send: Send
) -> None:
    """As `up` would find it, which then stops what it has started: its database refuses the runs that are planned."""
    nightly, log = deployment(live, "federated/nightly"), processes.log_file("prefect")
    refuse = "BEFORE INSERT ON flow_run WHEN NEW.auto_scheduled BEGIN SELECT RAISE(ABORT, 'no plans today'); END"
    with closing(sqlite3.connect(home.prefect_database(), timeout=60, isolation_level=None)) as connection:
        connection.execute(f"CREATE TRIGGER refuse {refuse}")
    for each in send("POST", f"{live[0].prefect_url}/flow_runs/filter", of_deployment(nightly["id"])):
        send("DELETE", f"{live[0].prefect_url}/flow_runs/{each['id']}", None)
    with pytest.raises(ServiceError, match=r"plans no runs of nightly: its service .*no plans today") as refused:
        planning.wait(live[0].prefect_url, servers.source, log, time.monotonic() + 90, print, lambda: True)
    assert "\n" not in str(refused.value)
    (line,) = re.findall(rf"\({re.escape(str(log))}:(\d+)\)", str(refused.value))
    assert re.search(r"ERROR .*schedule_(recent_)?deployments", log.read_text().split("\n")[int(line) - 1])
