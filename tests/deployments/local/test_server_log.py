"""What the log of a Prefect server says of its services: records as Prefect 3.8.8 writes them."""

from pathlib import Path

import pytest

from deployments.local.server_log import failures

LOG = """
 ___ ___ ___ ___ ___ ___ _____

19:23:07.531 | ERROR   | docket.dependencies - ↩ [    54ms] schedule_recent_deployments(){schedule_recent_deployments}
Traceback (most recent call last):
  File "/lib/docket/worker.py", line 1134, in _execute
    result = await execution.function(
             ^^^^^^^^^^^^^^^^^^^^^^^^^
KeyError: 'an error on the way'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/lib/sqlalchemy/ext/hybrid.py", line 1851, in prop
    raise exc.InvalidRequestError(
sqlalchemy.exc.InvalidRequestError: Can't evaluate bulk DML statement; please supply a bulk_dml decorated function
19:23:08.000 | INFO    | prefect.server.services.foreman - Marked 1 workers as offline.
2026-11-27 19:24:07.531 | ERROR   | docket.worker - ↩ [    5ms] mark_flow_run_late(flow_run_id=1){mark-flow-run-late:1}
Traceback (most recent call last):
sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) database is locked
[SQL: UPDATE flow_run SET state_id=?]
(Background on this error at: https://sqlalche.me/e/20/e3q8)
2026-11-27 19:25:00.000 | ERROR   | prefect.server - EventPersister service failed!
2026-11-27 19:25:01.000 | WARNING | prefect.server.events.triggers - nothing that matters
2026-11-27 19:25:02.000 | ERROR   | prefect.server.services.scheduler - Error scheduling deployment 'x'.
2026-11-27 19:25:03.100 | ERROR   | docket.dependencies - ↩ [    5ms] schedule_recent_deployments(){schedule_recent}
Traceback (most recent call last):
ValueError
"""


def test_each_service_that_failed_is_told_once_with_what_came_out_of_it(tmp_path: Path) -> None:
    log = tmp_path / "prefect.log"
    log.write_text(LOG)
    found = {each.service: each for each in failures(log)}
    assert list(found) == ["mark_flow_run_late", "EventPersister", "scheduler", "schedule_recent_deployments"]
    late, scheduler = found["mark_flow_run_late"], found["schedule_recent_deployments"]
    assert late.reason == "sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) database is locked"
    assert late.passing
    assert (scheduler.when, scheduler.reason, scheduler.times) == ("2026-11-27 19:25:03", "ValueError", 2)
    assert not scheduler.passing
    assert found["EventPersister"].reason == "EventPersister service failed!"
    lines = LOG.split("\n")
    assert all(each.service in lines[each.line - 1] for each in found.values())


def test_the_first_failure_tells_the_last_exception_of_the_chain(tmp_path: Path) -> None:
    log = tmp_path / "prefect.log"
    log.write_text(LOG.partition("19:23:08")[0])
    assert [each.reason.partition(":")[0] for each in failures(log)] == ["sqlalchemy.exc.InvalidRequestError"]


def test_lines_of_a_long_log_are_counted_from_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "prefect.log"
    log.write_text("quiet\n" * 1000 + LOG)
    whole = failures(log)
    monkeypatch.setattr("deployments.local.server_log._TAIL", 400)
    assert [each.line for each in failures(log)] == [each.line for each in whole][-2:]


def test_no_log_no_failures(tmp_path: Path) -> None:
    assert failures(tmp_path / "missing.log") == []
    (tmp_path / "empty.log").touch()
    assert failures(tmp_path / "empty.log") == []
