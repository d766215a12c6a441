"""Federated LoRA: aggregation strategies, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

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


def lazily(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`: its public names, and modules under their own, are imported when first used."""

    def found(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        from importlib import import_module

        home = import_module(homes[name])
        return home if homes[name].endswith(f".{name}") else getattr(home, name)

    return found


_HOMES = {
    "RunConfig": "fedlora.config",
    "aggregate": "fedlora.exchange.aggregation",
    "apply_base_update": "fedlora.exchange.merging",
    "load_adapter": "fedlora.exchange.inference",
    "load_base": "fedlora.exchange.inference",
    "load_merged": "fedlora.exchange.merging",
    "merge": "fedlora.exchange.merging",
    "train": "fedlora.run.loop",
    "configfile": "fedlora.config.configfile",  # programs import it from here
}

__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    """What a prompt offers on a tab: the public names too, though none has been imported yet."""
    return sorted({*globals(), *__all__})
