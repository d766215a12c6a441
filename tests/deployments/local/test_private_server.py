"""A server whose imports begin ahead: nothing of it is seen until it is told to serve."""

import pytest

from deployments.local import private_server
from fedlora.errors import FedloraError


@pytest.fixture
def warm(tmp_path, monkeypatch):
    """A home that has had a server, without any setting of Prefect's."""
    for name in ("PREFECT_API_URL", "PREFECT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    monkeypatch.setattr(private_server.forerunner, "begin", lambda: None)
    monkeypatch.setattr(private_server, "_ahead", None)
    (tmp_path / "home/prefect").mkdir(parents=True)
    return tmp_path


def test_a_process_that_only_imports_ends_when_its_input_does_and_leaves_nothing(warm):
    private_server.begin_imports()
    server = private_server._ahead
    assert server is not None
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.process.wait(60) == 0
    assert [path.name for path in (warm / "home").rglob("*")] == ["prefect"]


@pytest.mark.parametrize("why", ["a server is named", "a profile may name one", "a new home"])
def test_no_server_is_begun_that_may_not_be_needed(warm, monkeypatch, why):
    if why == "a server is named":
        monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    elif why == "a profile may name one":
        (warm / "profiles.toml").touch()
    else:
        (warm / "home/prefect").rmdir()
    monkeypatch.setattr(private_server, "_spawn", lambda: pytest.fail("a server was begun"))
    private_server.begin_imports()


def test_what_went_wrong_before_there_was_a_log_is_told(warm, monkeypatch):
    (warm / "broken/prefect").mkdir(parents=True)
    (warm / "broken/prefect/__init__.py").write_text("raise ImportError('no such library')")
    monkeypatch.setenv("PYTHONPATH", str(warm / "broken"))
    monkeypatch.setattr(private_server, "_configured", lambda: False)
    with pytest.raises(FedloraError, match=r"does not start .*no such library"), private_server.available():
        pass
