"""Slots in processes that really start, work, are killed, and end with their parent."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import nullcontext

import psutil
import pytest
import torch

from fedlora.config import RunnerConfig
from fedlora.errors import ConfigError, RunAborted, WorkerError
from fedlora.training import forerunner, workers
from fedlora.training.workerprocess import WorkerProcess
from fedlora.training.workers import Pool, ProcessSlot, ThreadSlot, Workbench, slot_devices

JOBS = """
import os, signal, time

def pid(bench):
    return os.getpid()

def count(bench, key):
    made = []
    bench.keep("thing", key, lambda: made.append(key) or key)
    return len(made)

def echo(bench, *args, **kwargs):
    import torch
    return bench.device, args, kwargs, torch.get_num_threads()

def die(bench, folder, number, client):
    os.kill(os.getpid(), signal.SIGKILL)

def fail(bench):
    raise ValueError("an error of the job itself")

def decompose(bench):
    import torch
    matrix = torch.randn(128, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(matrix).Q

def time_out(bench):
    raise TimeoutError("of the job itself")

def sleep(bench, seconds, mark):
    open(mark, "w").write(str(os.getpid()))
    time.sleep(seconds)

def answer_late(bench, seconds):
    time.sleep(seconds)
    return "in time"

def unreadable(bench):
    class Own(Exception):
        pass
    raise Own("nobody else knows this class")

def environment(bench):
    return os.environ.get("FEDLORA_TEST_MARK"), os.environ.get("HF_TEST_SETTING")

def touch(bench, mark="begun"):
    open(os.environ["FEDLORA_TEST_MARK"], "w").write("begun")
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """A module of jobs that worker processes can import as well."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "jobs_in_workers.py").write_text(JOBS)
    sys.path.insert(0, str(folder))
    import jobs_in_workers

    yield jobs_in_workers
    sys.path.remove(str(folder))
    del sys.modules["jobs_in_workers"]


@pytest.fixture(scope="module")
def slot(jobs):
    slot = ProcessSlot("cpu", 1)
    yield slot
    slot.close()


def until(happens, seconds: float = 60):
    """The first true value of `happens()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := happens():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def gone(pid: int) -> bool:
    """Whether a process has ended; asked in one go, for it may do so between two questions."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# -- the bench


def test_the_bench_keeps_the_latest_value_of_each_kind():
    bench, made = Workbench("cpu"), []

    def make(value):
        return lambda: made.append(value) or value

    assert [bench.keep("model", key, make(key)) for key in ("a", "a", "b", "a")] == ["a", "a", "b", "a"]
    assert bench.keep("data", "a", make("data")) == "data"
    assert bench.keep("model", "a", make("never")) == "a"
    assert made == ["a", "b", "a", "data"]


def test_the_old_value_is_let_go_before_the_new_one_is_made():
    bench = Workbench("cpu")
    bench.keep("model", "a", lambda: "old")
    assert bench.keep("model", "b", lambda: dict(bench.kept)) == {}
    assert bench.renew("model", "b", lambda: "made again") == "made again"


def test_what_cannot_be_made_is_not_kept():
    bench = Workbench("cpu")
    with pytest.raises(ZeroDivisionError):
        bench.keep("model", "a", lambda: 1 // 0)
    assert bench.keep("model", "a", lambda: "made") == "made"


# -- processes


def test_a_process_slot_runs_jobs_in_one_other_process_and_keeps_its_bench(slot, jobs):
    pids = {slot.run(jobs.pid) for _ in range(3)}
    assert len(pids) == 1
    assert os.getpid() not in pids
    assert [slot.run(jobs.count, key) for key in (1, 1, 2, 2, 1)] == [1, 0, 1, 0, 1]
    assert slot.run(jobs.echo, 1, name="x") == ("cpu", (1,), {"name": "x"}, 1)


def test_an_error_of_the_job_arrives_as_itself_and_costs_no_worker(slot, jobs):
    before = slot.run(jobs.pid)
    with pytest.raises(ValueError, match="an error of the job itself"):
        slot.run(jobs.fail)
    assert slot.run(jobs.pid) == before


def test_a_killed_worker_is_named_and_the_next_job_gets_a_new_one(slot, jobs):
    before = slot.run(jobs.pid)
    with pytest.raises(WorkerError, match=r"worker process on cpu, during die\(3, 7\), died .*out of memory"):
        slot.run(jobs.die, "/folder", 3, 7)
    assert slot.run(jobs.pid) != before
    assert slot.run(jobs.count, 1) == 1  # a new bench: the old one is lost


def test_a_job_gives_the_same_bits_in_every_thread_of_this_process(jobs):
    """Each has a number of torch threads of its own, and a decomposition of small matrices shows it."""
    slot, found = ThreadSlot("cpu", 1), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(slot.run(jobs.decompose)))
        thread.start()
        thread.join()
    assert all(torch.equal(other, slot.run(jobs.decompose)) for other in found)


def test_a_worker_that_hangs_is_ended_and_the_next_job_gets_a_new_one(slot, jobs, tmp_path):
    before = slot.run(jobs.pid)
    with pytest.raises(WorkerError, match=r"during sleep\(.*, was ended after 0.5 s \(runner.timeout_s\)"):
        slot.run_within(0.5, jobs.sleep, 600, str(tmp_path / "mark"))
    assert not psutil.pid_exists(before)
    assert slot.run_within(60, jobs.pid) != before


def test_an_idle_worker_that_dies_is_replaced_and_the_next_job_knows_nothing_of_it(slot, jobs):
    for _ in range(2):
        before = slot.run(jobs.pid)
        os.kill(before, signal.SIGKILL)
        until(lambda pid=before: gone(pid), 10)
        assert slot.run(jobs.pid) != before


def test_a_worker_that_dies_before_it_takes_its_job_costs_no_attempt(slot, jobs, monkeypatch):
    """It dies at the very moment when the job is handed over."""
    before, real = slot.run(jobs.pid), WorkerProcess.alive

    def alive_then_dead(worker):
        found = real(worker)
        if found and worker._process.pid == before:
            os.kill(before, signal.SIGKILL)
            until(lambda: gone(before), 10)
        return found

    monkeypatch.setattr(WorkerProcess, "alive", alive_then_dead)
    assert slot.run(jobs.pid) != before


def test_a_result_that_comes_at_the_instant_of_its_time_out_counts(slot, jobs, monkeypatch):
    """The wait is over, and what ends the process finds that the answer is there."""
    slot.run(jobs.pid)
    real = WorkerProcess._speaks_within

    def misses_the_answer(worker, seconds):
        answered = real(worker, 60)
        return answered and seconds != 0.25

    monkeypatch.setattr(WorkerProcess, "_speaks_within", misses_the_answer)
    assert slot.run_within(0.25, jobs.answer_late, 0) == "in time"
    monkeypatch.undo()
    assert slot.run_within(60, jobs.answer_late, 0) == "in time"


def test_the_time_of_a_job_does_not_hold_the_start_of_its_process(jobs):
    slot = ProcessSlot("cpu", 1)
    assert slot.run_within(0.5, jobs.answer_late, 0) == "in time"
    slot.close()


def test_an_error_that_cannot_travel_arrives_as_its_text(slot, jobs):
    with pytest.raises(RuntimeError, match="Own: nobody else knows this class"):
        slot.run(jobs.unreadable)


def test_whoever_is_interrupted_while_waiting_does_not_leave_an_answer_for_the_next(slot, jobs, monkeypatch):
    def interrupted(worker, seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as within:
        within.setattr(WorkerProcess, "_speaks_within", interrupted)
        with pytest.raises(KeyboardInterrupt):
            slot.run(jobs.answer_late, 0)
    assert slot.run(jobs.pid) != "in time"


@pytest.mark.parametrize("setting", [None, "another"], ids=["forked", "started from nothing"])
def test_a_worker_has_the_environment_of_now(slot, jobs, monkeypatch, setting):
    """A forked one too; where a library may have read something else at its import, nothing is forked."""
    slot.run(jobs.pid)
    monkeypatch.setenv("FEDLORA_TEST_MARK", "of now")
    if setting:
        monkeypatch.setenv("HF_TEST_SETTING", setting)
    other = ProcessSlot("cpu", 1)
    assert other.run(jobs.environment) == ("of now", setting)
    assert other._worker._process._start_method == ("spawn" if setting or sys.platform != "linux" else "forkserver")
    other.close()


def test_a_gpus_worker_starts_from_nothing():
    """CUDA refuses to work in a process that was forked."""
    assert forerunner.context("cuda:0").get_start_method() == "spawn"


def test_a_jobs_own_timeout_is_an_error_of_the_job(slot, jobs):
    with pytest.raises(TimeoutError, match="of the job itself"):
        slot.run_within(60, jobs.time_out)


def test_closing_now_ends_a_job_under_way_and_refuses_the_next(jobs, tmp_path):
    slot, failures = ProcessSlot("cpu", 1), []

    def work():
        try:
            slot.run(jobs.sleep, 30, str(tmp_path / "mark"))
        except RunAborted as error:
            failures.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    pid = int(until(lambda: (tmp_path / "mark").exists() and (tmp_path / "mark").read_text()))
    begun = time.monotonic()
    slot.close(now=True)
    thread.join(10)
    assert time.monotonic() - begun < 10
    assert failures == ["stopped"]
    until(lambda: gone(pid), 10)
    with pytest.raises(RunAborted, match="stopped"):
        slot.run(jobs.pid)


class SlowToClose:
    """A pipe that takes its time to close: whoever closes it meanwhile, or reads from it, is seen."""

    def __init__(self, pipe):
        self.pipe, self.closed_by = pipe, []

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def close(self):
        self.closed_by.append(threading.current_thread().name)
        time.sleep(0.2)
        self.pipe.close()


def test_several_threads_that_end_a_worker_at_once_close_its_pipe_once(jobs, tmp_path):
    """As when a run is stopped: whoever stops it ends the workers, and so do those who waited for a job."""
    worker = WorkerProcess("cpu", 1)
    worker._pipe = pipe = SlowToClose(worker._pipe)
    found = []
    given = (None, jobs.sleep, (60, str(tmp_path / "begun")), {})
    busy = threading.Thread(target=lambda: found.append(worker.work(*given)))
    busy.start()
    assert until((tmp_path / "begun").exists)
    ending = [threading.Thread(target=worker.end, kwargs={"now": True}, name=str(index)) for index in range(6)]
    for thread in ending:
        thread.start()
    for thread in (*ending, busy):
        thread.join(60)
    assert len(pipe.closed_by) == 1
    assert [str(outcome.error) for outcome in found] == ["stopped"]
    assert not worker.alive()


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """A parent that can clean up nothing: SIGKILL, while one worker sleeps in a job."""
    (tmp_path / "jobs_in_workers.py").write_text(JOBS)
    script = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import jobs_in_workers
        from fedlora.training.workers import ProcessSlot
        if __name__ == "__main__":
            ProcessSlot("cpu", 1).run(jobs_in_workers.sleep, 600, {str(tmp_path / "mark")!r})
    """
    (tmp_path / "parent.py").write_text(textwrap.dedent(script))
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")])
    try:
        child = int(until(lambda: (tmp_path / "mark").exists() and (tmp_path / "mark").read_text(), 180))
        assert child != parent.pid
        assert not gone(child)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    until(lambda: gone(child), 10)


def test_start_lets_a_worker_begin_without_waiting(jobs, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_TEST_MARK", str(tmp_path / "mark"))
    pool = Pool(RunnerConfig(kind="processes", slots=1, device="cpu"))
    begun = time.monotonic()
    pool.start(jobs.touch)
    assert time.monotonic() - begun < 1
    until((tmp_path / "mark").exists)
    pool.close()


# -- threads and pools


def test_a_thread_slot_is_this_process(jobs):
    slot = ThreadSlot("cpu", 1)
    assert slot.run(jobs.pid) == os.getpid()
    assert [slot.run(jobs.count, 1), slot.run(jobs.count, 1)] == [1, 0]
    assert slot.run(jobs.echo, 1, name="x")[:3] == ("cpu", (1,), {"name": "x"})
    slot.close()
    assert slot.run(jobs.count, 1) == 1


def test_a_borrowed_slot_is_for_one_job_at_a_time():
    pool = Pool(RunnerConfig(kind="threads", device="cpu"))
    inside, most = 0, 0

    def job(bench):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)
        inside -= 1

    threads = [threading.Thread(target=pool.run, args=(job,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_failed_job_gives_its_slot_back(jobs):
    pool = Pool(RunnerConfig(kind="threads", device="cpu"))
    with pytest.raises(ValueError, match="of the job itself"):
        pool.run(jobs.fail)
    assert pool.run(jobs.pid) == os.getpid()


def test_one_pool_is_shared_by_all_who_ask_and_closed_by_the_last(jobs):
    """A slot of this process keeps what a job has made until it is closed."""
    runner = RunnerConfig(kind="threads", device="cpu")
    with workers.open_pool(runner) as one:
        assert one.run(jobs.count, "a") == 1
        with workers.open_pool(runner.model_copy(update={"retries": 9})) as two:
            assert one is two is workers.current_pool(runner)
        assert one.run(jobs.count, "a") == 0
        with workers.open_pool(runner.model_copy(update={"threads": 2})) as other:
            assert other is not one
            assert [other.run(jobs.count, "a") for _ in range(2)] == [1, 0]
        assert other.run(jobs.count, "a") == 1
        assert one.run(jobs.count, "a") == 0
    assert one.run(jobs.count, "a") == 1
    with pytest.raises(KeyError):
        workers.current_pool(runner)


@pytest.mark.parametrize("fails", [False, True])
def test_a_pool_waits_for_its_jobs_and_ends_them_at_once_when_its_user_fails(jobs, tmp_path, fails):
    ended = []

    def work(pool):
        try:
            pool.run(jobs.sleep, 600 if fails else 1, str(tmp_path / "mark"))
            ended.append("done")
        except RunAborted as error:
            ended.append(str(error))

    with (
        pytest.raises(RuntimeError) if fails else nullcontext(),
        workers.open_pool(RunnerConfig(kind="processes", slots=1, device="cpu")) as pool,
    ):
        thread = threading.Thread(target=work, args=(pool,))
        thread.start()
        assert until((tmp_path / "mark").exists)
        if fails:
            raise RuntimeError
    thread.join(60)
    assert ended == ["stopped" if fails else "done"]


# -- devices


@pytest.fixture
def gpus(monkeypatch):
    """A function: let torch see this many GPUs, and no Apple one."""

    def see(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return see


@pytest.mark.parametrize(
    ("count", "runner", "devices"),
    [
        (0, {"device": "cpu", "slots": 3}, ["cpu"] * 3),
        (2, {"device": "cpu", "slots": 1}, ["cpu"]),
        (0, {"device": "auto", "slots": 2}, ["cpu", "cpu"]),
        (0, {"device": "auto", "kind": "threads"}, ["cpu"]),
        (2, {"device": "auto"}, ["cuda:0", "cuda:1"]),
        (2, {"device": "cuda"}, ["cuda:0", "cuda:1"]),
        (2, {"device": "cuda", "kind": "threads"}, ["cuda:0", "cuda:1"]),
        (2, {"device": "cuda", "slots": 1}, ["cuda:0"]),
        (2, {"device": "cuda:1"}, ["cuda:1"]),
    ],
)
def test_devices_of_slots(gpus, count, runner, devices):
    gpus(count)
    assert slot_devices(RunnerConfig(**runner)) == devices


def test_slots_follow_the_cores_up_to_eight(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setattr(workers, "_usable_cores", lambda: 3)
    assert slot_devices(RunnerConfig()) == ["cpu"] * 3
    monkeypatch.setattr(workers, "_usable_cores", lambda: 96)
    assert slot_devices(RunnerConfig()) == ["cpu"] * 8


@pytest.mark.parametrize(
    ("count", "runner", "message"),
    [
        (0, {"device": "cuda"}, r"runner.device=cuda, but torch sees no GPU here; use runner.device=cpu"),
        (2, {"device": "cuda:2"}, r"runner.device=cuda:2, but torch sees cuda:0, cuda:1 here"),
        (0, {"device": "mps"}, r"no Apple GPU; use runner.device=cpu"),
        (2, {"device": "auto", "slots": 3}, r"runner.slots=3, but each slot owns a GPU and there are 2"),
    ],
)
def test_devices_that_are_not_there(gpus, count, runner, message):
    gpus(count)
    with pytest.raises(ConfigError, match=message):
        slot_devices(RunnerConfig(**runner))
