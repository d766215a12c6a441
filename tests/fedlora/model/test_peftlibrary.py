"""PEFT is imported without torch's compiler, which bitsandbytes asks for as it is imported (that it is not there after
all imports of a worker: `tests/fedlora/training/test_forerunner.py`)."""

import pytest
import torch

from fedlora.model import peftlibrary


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


def test_once_it_is_imported_the_compiler_is_left_alone(monkeypatch):
    """By threads that ask at the same time, too: none finds what another has put in its place."""
    peftlibrary.load()
    monkeypatch.setattr(peftlibrary, "_compiled_when_called", lambda: pytest.fail("replaced again"))
    assert peftlibrary.load().LoraConfig
