"""How many cases, from which seed, in a folder of the memory, with a lid on the memory of the process.

Without `FUZZ_CASES` every harness runs a small number of cases that is the same each time. `make fuzz` sets it, and
`FUZZ_SEED`.
"""

import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

SHARD = 2000
"""Cases that Hypothesis sees as one: it remembers them all."""


def pytest_generate_tests(metafunc):
    """`shard` is (number of cases, seed or None for the same cases each time)."""
    if "shard" not in metafunc.fixturenames:
        return
    cases = int(os.environ.get("FUZZ_CASES", "0"))
    if not cases:
        metafunc.parametrize("shard", [(150, None)], ids=["same-each-time"])
        return
    share = round(cases * metafunc.module.SHARE)
    first = int(os.environ.get("FUZZ_SEED", "0"))
    shards = [(min(SHARD, share - start), first + index) for index, start in enumerate(range(0, share, SHARD))]
    metafunc.parametrize("shard", shards, ids=[str(seed) for _, seed in shards])


@pytest.fixture
def place(monkeypatch):
    """An empty folder, in memory where the machine allows it: a case writes and syncs files."""
    memory = Path("/dev/shm")
    above = memory if os.access(memory, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="fedlora-fuzz-", dir=above))
    for name in ("here", "cases"):
        (folder / name).mkdir()
    monkeypatch.chdir(folder / "here")
    yield folder / "cases"
    assert not list((folder / "here").iterdir()), "something was written to the working folder"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def lid():
    """What a case of a few kilobytes asks for beyond this is an error, not a machine that swaps."""
    torch.linalg.svd(torch.rand(3, 2))  # libraries that are loaded with the first use
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
