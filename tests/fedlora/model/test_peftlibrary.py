"""PEFT is imported without torch's compiler, which bitsandbytes asks for as it is imported."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fedlora.model import peftlibrary

IMPORTED = """
import sys
from fedlora.model import peftlibrary
import torch
before = torch.compile
peft = peftlibrary.load()
assert peft.LoraConfig and torch.compile is before
names = "bitsandbytes", "torch._inductor.compile_fx", "torch._inductor.lowering"
print(*[name for name in names if name in sys.modules])
"""


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_the_compiler_is_not_imported_with_bitsandbytes():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["bitsandbytes"]


def test_a_function_is_compiled_once_when_it_is_first_called(monkeypatch):
    compiled = []

    def compile_now(function=None, **how):
        compiled.append((function, how))
        return (lambda given: compile_now(given, **how)) if function is None else (lambda x: ("compiled", function(x)))

    monkeypatch.setattr(torch, "compile", compile_now)
    with peftlibrary._compiled_when_called():
        double = torch.compile(lambda x: 2 * x, dynamic=True)
        assert compiled == []
        decorated = torch.compile(mode="max-autotune")(lambda x: 3 * x)
        assert [how for _, how in compiled] == [{"mode": "max-autotune"}] * 2
    assert torch.compile is compile_now
    assert double(4) == double(4) == ("compiled", 8)
    assert [how for _, how in compiled][2:] == [{"dynamic": True}]
    assert decorated(1) == ("compiled", 3)


def test_a_compiler_that_fails_is_heard_of_at_the_call(monkeypatch):
    """As bitsandbytes expects: it goes on without."""

    def compile_now(function, **how):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", compile_now)
    with peftlibrary._compiled_when_called():
        function = torch.compile(len)
    with pytest.raises(RuntimeError, match="no compiler"):
        function("abc")
    assert torch.compile is compile_now
