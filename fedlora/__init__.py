"""Federated LoRA: aggregation strategies, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedlora.config import RunConfig
    from fedlora.exchange.aggregation import aggregate
    from fedlora.exchange.inference import load_adapter, load_base
    from fedlora.exchange.merging import apply_base_update, load_merged, merge
    from fedlora.run.loop import train

__all__ = [
    "RunConfig",
    "aggregate",
    "apply_base_update",
    "load_adapter",
    "load_base",
    "load_merged",
    "merge",
    "train",
]

_HOMES = {
    "RunConfig": "fedlora.config",
    "aggregate": "fedlora.exchange.aggregation",
    "apply_base_update": "fedlora.exchange.merging",
    "load_adapter": "fedlora.exchange.inference",
    "load_base": "fedlora.exchange.inference",
    "load_merged": "fedlora.exchange.merging",
    "merge": "fedlora.exchange.merging",
    "train": "fedlora.run.loop",
}

_MODULES = {"configfile": "fedlora.config.configfile"}
"""Modules that programs import from here (`from fedlora import configfile`), and where they are."""


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: `import fedlora` stays fast."""
    if name not in {*_HOMES, *_MODULES}:
        raise AttributeError(f"module 'fedlora' has no attribute '{name}'")
    from importlib import import_module

    if name in _MODULES:
        return import_module(_MODULES[name])
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """What a prompt offers on a tab: the public names too, though none has been imported yet."""
    return sorted({*globals(), *__all__})
