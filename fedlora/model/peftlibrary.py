"""PEFT, imported without what nearly no run needs of it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

import torch

_once = threading.Lock()


def load() -> Any:
    """The package `peft`.

    Where bitsandbytes is installed, PEFT imports it, and three of its functions are compiled as they are defined: for
    that torch's compiler is imported, three seconds in every process, also where no base is quantised. Here they are
    compiled when they are first called.
    """
    with _once:  # two threads that put `torch.compile` back would leave it replaced
        if "peft" not in sys.modules:
            with _compiled_when_called(), suppress(ImportError):
                import bitsandbytes  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
    import peft

    return peft


@contextmanager
def _compiled_when_called() -> Iterator[None]:
    """Within, `torch.compile` of a function leaves the compiling to the function's first call."""
    compile_now: Any = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **how: Any) -> Any:
        if function is None:
            return compile_now(**how)
        return _later(function, lambda: compile_now(function, **how))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


def _later(function: Callable[..., Any], make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    made: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        if not made:
            made.append(make())
        return made[0](*given, **named)

    return call
