"""One set of servers for the tests of `up`, of what the servers do by themselves, and of `down`, in this order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from standins import OFTEN, SEVERAL, Listener, Live, set_home, write_flows

from deployments.local import automations
from deployments.local.services import down, up


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    set_home(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def servers(free_ports: Callable[[], tuple[int, int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """In a new home, with a space in its name, as on some desktops. `test_stopping.py` ends them."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("a home")
    write_flows(source, declared=SEVERAL)
    listener = Listener()
    more = {automations.NOTIFY_URL: listener.url, **OFTEN}
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        set_home(patch, folder, **more)
        services = up(*free_ports(), report=said.append, source=source)
    nightly = httpx.get(f"{services.prefect_url}/deployments/name/federated/nightly", timeout=30).json()["id"]
    chosen = {"flow_runs": {"deployment_id": {"any_": [nightly]}}}
    planned = httpx.post(f"{services.prefect_url}/flow_runs/filter", json=chosen, timeout=30).json()
    yield Live(services, source, folder, said, listener, more, planned)
    with pytest.MonkeyPatch.context() as patch:
        set_home(patch, folder)
        down(report=said.append)
    listener.server.shutdown()
    listener.server.server_close()


@pytest.fixture(scope="module")
def live(servers: Live) -> Iterator[Live]:
    """These servers, in their home."""
    with pytest.MonkeyPatch.context() as patch:
        set_home(patch, servers.folder, **servers.environ)
        yield servers
