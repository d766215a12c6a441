"""What is imported ahead leaves nothing behind."""

import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forked on Linux only")

AHEAD = """
import psutil
from fedlora.training import forerunner
forerunner.begin()
forerunner.begin()
assert "torch" not in __import__("sys").modules
print(*(child.pid for child in psutil.Process().children()), flush=True)
"""


def test_imports_under_way_end_with_the_process_they_are_for():
    """It ends at once, as a command does that refuses its configuration: seconds before the imports are done."""
    done = subprocess.run([sys.executable, "-c", AHEAD], capture_output=True, text=True, check=True, timeout=60)
    started = [int(word) for word in done.stdout.split()]
    assert started
    assert done.stderr == ""
    end = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in started) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in started if psutil.pid_exists(pid)]


HEAVY = {
    "flows.federated": {"datasets", "pandas", "mlflow", "transformers", "peft", "matplotlib", "scipy"},
    "fedlora.run.preloaded": {"datasets", "pandas", "mlflow", "torch._inductor.compile_fx"},
    "flows.sweep": {"datasets", "mlflow", "matplotlib", "scipy.stats"},
}


def test_what_the_first_score_does_not_need_is_not_imported():
    """One after the other in one process."""
    code = "import sys, importlib\nfor module, heavy in {HEAVY}.items():\n".replace("{HEAVY}", repr(HEAVY))
    code += "    importlib.import_module(module); print(module, *sorted(heavy & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == list(HEAVY)


FORKED = """
import os
from fedlora.training import forerunner
forerunner.begin()
from torch._inductor.runtime.cache_dir_utils import cache_dir
cache_dir()
print(forerunner.context("cpu").get_start_method())
os.environ["OMP_NUM_THREADS"] = "7"
print(forerunner.context("cpu").get_start_method())
"""


def test_what_libraries_set_by_themselves_does_not_stop_the_forking_of_workers():
    """Torch names the folder of compiled code in the environment as soon as anything asks for it; a setting of the
    user's that came later is another matter."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["forkserver", "spawn"]
