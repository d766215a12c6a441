"""When `up` waits for planned runs, and what it says when there is nothing to wait for. With servers: test_services."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deployments.local import planning
from deployments.local.processes import ServiceError

NOWHERE = "http://127.0.0.1:9/api"
DECLARED = 'deployments:\n- {name: nightly, entrypoint: "a.py:b", schedules: [{cron: "0 2 * * *"}]}\n'
FAILED = (
    "2026-11-27 19:23:07.531 | ERROR   | docket.dependencies - ↩ [54ms] schedule_deployments(){x}\nValueError: no\n"
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "deployments").mkdir()
    (tmp_path / "deployments" / "prefect.yaml").write_text(DECLARED)
    return tmp_path


def wait(source: Path, said: list[str], seconds: float = 0.0, alive: bool = True) -> None:
    deadline = time.monotonic() + seconds
    planning.wait(NOWHERE, source, source / "prefect.log", deadline, said.append, lambda: alive)


def test_where_nothing_is_scheduled_no_server_is_asked(source: Path) -> None:
    (source / "deployments" / "prefect.yaml").write_text('deployments:\n- {name: custom, entrypoint: "a.py:b"}\n')
    said: list[str] = []
    wait(source, said)
    assert said == []


@pytest.mark.parametrize("value", ["0", "False"])
def test_a_scheduler_that_is_switched_off_is_told_and_not_waited_for(
    source: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED", value)
    said: list[str] = []
    wait(source, said)
    assert len(said) == 1
    assert "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED" in said[0]


def test_time_that_is_up_a_server_that_died_and_a_service_that_failed_are_different_words(source: Path) -> None:
    with pytest.raises(ServiceError, match=r"has planned no runs of nightly.*prefect\.log"):
        wait(source, [])
    with pytest.raises(ServiceError, match="stopped before it had planned runs of nightly"):
        wait(source, [], 60, alive=False)
    (source / "prefect.log").write_text(FAILED)
    with pytest.raises(ServiceError, match=r"service schedule_deployments failed at .* ValueError: no .*\.log:1\)"):
        wait(source, [], 60)


def test_a_lock_of_sqlite_is_waited_for(source: Path) -> None:
    (source / "prefect.log").write_text(FAILED.replace("ValueError: no", "E: database is locked"))
    with pytest.raises(ServiceError, match="has planned no runs"):
        wait(source, [], 0.5)


def test_only_active_schedules_count() -> None:
    def deployment(paused: bool, *active: bool) -> dict[str, object]:
        schedules = [{"active": each} for each in active]
        return {"id": "i", "flow_id": "f", "name": "n", "entrypoint": None, "paused": paused, "schedules": schedules}

    assert [
        len(planning.scheduled([each]))
        for each in (deployment(False), deployment(False, False, True), deployment(True, True))
    ] == [0, 1, 0]
