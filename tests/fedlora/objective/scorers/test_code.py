"""Code that a model wrote is run with little to do harm by."""

import os
import time

import psutil
import pytest

from fedlora.data.questions import Reference
from fedlora.objective.scorers import sandbox
from fedlora.objective.scorers.code import Code, program

TESTS = ("assert double(2) == 4", "assert double(-1) == -2")
RIGHT = "def double(x):\n    return 2 * x\n"
BARE = sandbox.Isolation()


@pytest.mark.parametrize("way", [None, BARE], ids=["best", "bare"])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("assert 1 + 1 == 2", None),
        ("assert 1 + 1 == 3", "AssertionError"),
        ("import sys; sys.exit(0)", "exit code 0"),
        ("import os; os._exit(0)", "exit code 0"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("open('big', 'w').write('a' * 10**8)", "File too large"),
        ("import os; assert set(os.environ) <= {'PATH', 'LC_CTYPE', 'PWD'}", None),
        ("import os; assert os.listdir('.')", None),
        ("it is no python", "SyntaxError"),
        ("print('\ud800')", None),
    ],
)
def test_what_comes_of_a_program(text, why, way):
    found = sandbox.run(text, within=way)
    assert found is None if why is None else why in found


def test_what_does_not_end_is_ended_with_all_that_it_started():
    mark = f"6{os.getpid()}"
    begun = time.perf_counter()
    found = sandbox.run(f"import subprocess; subprocess.run(['sleep', '{mark}'])", seconds=1)
    assert found
    assert time.perf_counter() - begun < 30
    left = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"] == ["sleep", mark]]
    assert not left


def test_a_program_that_spins_is_ended():
    assert sandbox.run("while True: pass", seconds=1)


@pytest.mark.skipif(not sandbox.isolation().command, reason="the kernel allows no namespaces here")
def test_where_the_kernel_allows_it_there_is_no_network():
    reach = "import socket; socket.create_connection(('192.0.2.1', 9), 1)"
    assert "unreachable" in sandbox.run(reach)


def test_the_secrets_of_the_environment_are_not_handed_on(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hush")
    assert sandbox.run("import os; assert 'MLFLOW_TRACKING_PASSWORD' not in os.environ") is None


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (RIGHT, 1),
        (f"Here it is:\n```python\n{RIGHT}```\nas you asked.", 1),
        (f"```\n{RIGHT}", 1),
        ("def double(x):\n    return x\n", 0),
        ("I cannot.", 0),
        ("", 0),
    ],
)
def test_an_answer_passes_the_tests_of_its_problem(answer, right):
    assert Code().judge(answer, Reference("Write double.", "", tests=TESTS)) == right


def test_a_completion_goes_on_where_the_question_ends():
    question, tests = "def double(x):\n", ("def check(f):\n    assert f(2) == 4", "check(double)")
    known = Reference(question, "    return 2 * x", tests=tests)
    assert Code().judge("    return 2 * x\n", known) == 1
    assert Code().judge("    return x\n", known) == 0
    assert program(RIGHT, known).startswith(RIGHT)
