"""`fedlora down`, of the servers that `test_services.py` has started."""

from __future__ import annotations

from standins import Live, marked

from deployments.local.services import down
from deployments.local.standing import processes as status
from fedlora.files import home


def test_down_stops_all_and_keeps_the_databases(live: Live) -> None:
    assert marked()
    said: list[str] = []
    down(report=said.append)
    assert "stopped" in said[0]
    assert str(home.home()) in said[0]
    assert marked() == []
    assert not home.services_file().exists()
    assert status() == []
    assert home.prefect_database().exists()
    assert home.mlflow_database().exists()
    down(report=said.append)
    assert "nothing to stop" in said[1]
