"""Runs on real clusters of Ray and Dask: two machines' worth of processes, with homes of their own, that see nothing of
the run folder; they are killed in mid-round, and another comes late. What workers do from afar is tested for every
strategy, without a cluster, in fedlora/run/test_mirror.py."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deployments.shipped import PRESETS
from fedlora.config import configfile
from fedlora.errors import ConfigError
from fedlora.run.loop import train
from fedlora.training import workers
from tasks import engines

FAR = {"runner.shared_files": False, "runner.group_s": 0}
FAMILIES = {
    "PS": {"strategy": "fedit"},
    "SP, which changes the base": {"strategy": "flora"},
    "personal": {"strategy": "fedsa-lora"},
    "core": {"strategy": "fed-sb"},
    "pooled data": {"strategy": "centralised"},
    "mixed ranks": {"strategy": "replication", "lora.ranks": [2, 4, 8]},
}


class RayCluster:
    """A head without room for clients, and machines."""

    def __init__(self, homes):
        from ray.cluster_utils import Cluster

        self.homes = homes
        # Without hooks for the end of the process, which only its main thread could set.
        self._cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args={"num_cpus": 0})
        self.address = self._cluster.address

    def add(self, name):
        home = {"FEDLORA_HOME": str(self.homes / name)}
        return self._cluster.add_node(num_cpus=1, env_vars=home)

    def kill(self, machine):
        self._cluster.remove_node(machine, allow_graceful=False)

    def close(self):
        self._cluster.shutdown()


class DaskCluster:
    """A scheduler, and workers without nannies."""

    def __init__(self, homes):
        self.homes = homes
        self._all = []
        self._scheduler = self._started("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        self.address = self._said(self._scheduler, "Scheduler at:")

    def _started(self, *words, home="scheduler"):
        folder = self.homes / home
        folder.mkdir(exist_ok=True)
        log = (folder / "log").open("w")
        environ = {**os.environ, "FEDLORA_HOME": str(folder)}
        words = [sys.executable, "-m", "distributed.cli.dask_" + words[0], *words[1:]]
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=folder)
        process.log = Path(log.name)
        self._all.append(process)
        return process

    @staticmethod
    def _said(process, what):
        for _ in range(600):
            for line in process.log.read_text().splitlines():
                if what in line:
                    return line.split(what)[1].strip()
            time.sleep(0.1)
        raise AssertionError(process.log.read_text())

    def add(self, name):
        how = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")
        process = self._started("worker", self.address, *how, home=name)
        self._said(process, "Starting established connection")
        return process

    def kill(self, machine):
        machine.send_signal(signal.SIGKILL)

    def close(self):
        for process in self._all:
            process.kill()
            process.wait()


def on(*clusters):
    """Of these clusters; each is there for all tests of it."""
    return pytest.mark.parametrize("cluster", clusters, indirect=True, scope="module")


BOTH = on(pytest.param(RayCluster, id="ray"), pytest.param(DaskCluster, id="dask"))


@pytest.fixture(scope="module")
def cluster(request, tmp_path_factory):
    found = request.param(tmp_path_factory.mktemp("homes"))
    found.kind = "ray" if request.param is RayCluster else "dask"
    try:
        found.machines = [found.add("first"), found.add("second")]
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def run_there(cluster, run_flow, tiny):
    """`run_there(changes)`: a tiny run on the cluster, which it stays connected to."""
    there = {"runner.kind": cluster.kind, "runner.address": cluster.address, **FAR}
    runner = configfile.load("demo", {**tiny, **there}, PRESETS).runner
    with engines.opened(runner), workers.open_pool(runner):
        yield lambda changes, **parameters: run_flow({**there, **changes}, **parameters)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.glob("rounds/*/*.safetensors"))}


@pytest.fixture(scope="module")
def here(tiny, tmp_path_factory):
    """`here(changes)`: the files of the same run in a slot beside its folder."""

    def run(changes):
        path = tmp_path_factory.mktemp("here") / "run"
        train(configfile.load("demo", {**tiny, **changes}, PRESETS), path)
        return files_of(path)

    return run


OFTEN = ("SP, which changes the base", "mixed ranks")


@BOTH
@pytest.mark.parametrize(
    "family", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.system) for name in FAMILIES]
)
def test_bits_are_those_of_a_slot_beside_the_run(family, run_there, here):
    assert files_of(run_there(FAMILIES[family]).path) == here(FAMILIES[family])


@BOTH
def test_more_than_a_machine_has_is_refused_before_there_is_a_folder(cluster, run_flow, tmp_path):
    there = {"runner.kind": cluster.kind, "runner.address": cluster.address, "runner.device": "auto"}
    with pytest.raises(ConfigError, match=r"no machine of the cluster has room for a client with .* and runner\.gpus"):
        run_flow({**there, "runner.gpus_per_client": 0.5}, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@on(pytest.param(RayCluster, marks=pytest.mark.system, id="ray"), pytest.param(DaskCluster, id="dask"))
def test_machines_that_are_killed_lose_nothing_and_one_that_comes_late_is_used(cluster, run_there, here, tmp_path):
    """Both are killed when the first client's update is there; a third, which comes then, does the rest."""
    changes = {"clients": 8, "rounds": 1, "training.local_steps": 40, "evaluation.local": False}
    folder, done = tmp_path / "run", threading.Event()

    def meddle():
        while not list(folder.glob("rounds/001/client-*.json")) and not done.wait(0.02):
            pass
        first, second = cluster.machines
        cluster.kill(second)
        cluster.kill(first)
        cluster.add("late")

    meddler = threading.Thread(target=meddle)
    meddler.start()
    try:
        run = run_there(changes, run_dir=folder)
    finally:
        done.set()
        meddler.join()
    assert files_of(run.path) == here(changes)
    assert list((cluster.homes / "late" / "cache" / "far" / "sets").iterdir())
