"""What can be known to be wrong before anything is loaded."""

from __future__ import annotations

from fedlora import model
from fedlora.config import RunConfig
from fedlora.data import sources
from fedlora.errors import StrategyRefusal
from fedlora.strategies import registry
from fedlora.workers import slot_devices


def check(config: RunConfig) -> None:
    """Resolve every name in a configuration: strategy, data, model, device.

    Raises:
        ConfigError, DataError, ModelError: one line that names the key, the value and what to do.
    """
    check_rank(config)
    sources.check(config.data)
    model.resolve(config.model.name)
    slot_devices(config.runner)


def check_rank(config: RunConfig) -> None:
    """Ask the strategy whether it can have the rank.

    Raises:
        StrategyRefusal: it cannot.
    """
    rank = config.lora.highest_rank
    if reason := registry.make(config.strategy, config.strategy_options).refuses_rank(rank):
        raise StrategyRefusal(f"strategy={config.strategy} does not go with lora.rank={rank}: {reason}")
