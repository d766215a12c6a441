"""What is known to be wrong with a cluster before anything is started."""

import socket

import pytest

from fedlora.config import RunnerConfig
from fedlora.errors import ConfigError
from fedlora.run import preflight
from fedlora.run.loop import train
from fedlora.training import engines


@pytest.mark.parametrize("kind", ["ray", "dask"])
def test_an_address_that_does_not_answer(kind, configure):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = configure({"runner.kind": kind, "runner.address": address})
        with pytest.raises(ConfigError, match=rf"runner.address={address} does not answer .*; start the cluster"):
            preflight.names(config)


@pytest.mark.parametrize("address", ["nonsense", "host:", "tcp://", "host:99999", "ray://host"])
def test_an_address_that_is_none(address):
    with pytest.raises(ConfigError, match="is no address; expected host:port"):
        engines.check(RunnerConfig(kind="ray", address=address))


@pytest.mark.parametrize(
    ("address", "place"),
    [("10.0.0.1:6379", ("10.0.0.1", 6379)), ("ray://head:10001", ("head", 10001)), ("tcp://[::1]:8786", ("::1", 8786))],
)
def test_addresses_with_and_without_a_scheme(address, place):
    assert engines.place_of(address) == place


def test_a_missing_extra(monkeypatch, configure):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"needs ray and prefect_ray, not installed here; pip install 'fedlora\[ray\]'"
    ):
        preflight.names(configure({"runner.kind": "ray"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runner.address": "here:1"}, "is for kind=ray and kind=dask, and kind is threads"),
        ({"runner.gpus_per_client": 0.5}, "is for kind=ray and kind=dask"),
        ({"runner.kind": "ray", "runner.gpus_per_client": 1}, "gpus_per_client=1 is not for device=cpu"),
        ({"runner.kind": "ray", "runner.device": "cuda"}, "needs gpus_per_client, for example 1 or 0.25"),
        ({"runner.kind": "dask", "runner.device": "cuda:1", "runner.gpus_per_client": 1}, "says itself which"),
        ({"runner.kind": "dask", "runner.exclusive": True}, "guards devices of this machine"),
        ({"runner.kind": "ray", "runner.timeout_s": 5}, "needs runner.kind=processes"),
    ],
)
def test_settings_that_do_not_go_together(configure, changes, said):
    with pytest.raises(ConfigError, match=said):
        configure(changes)


def test_where_a_run_is_computed_is_no_part_of_its_digest(configure):
    there = {"runner.kind": "ray", "runner.address": "head:6379", "runner.cpus_per_client": 2}
    assert configure(there).digest() == configure({"runner.shared_files": True}).digest()


def test_the_loop_without_prefect_says_what_to_do(configure, tmp_path):
    with pytest.raises(ConfigError, match="needs Prefect, which this loop does without; use `fedlora run`"):
        train(configure({"runner.kind": "dask"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
