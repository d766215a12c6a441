"""Starting from an adapter that there is (`lora.init`)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from fedlora.adapter.base_update import BaseUpdate
from fedlora.config import RunConfig
from fedlora.config.lora import REGISTRY
from fedlora.errors import AdapterError, ConfigError
from fedlora.exchange.description import description
from fedlora.exchange.peftfolder import (
    DESCRIPTION,
    WEIGHTS,
    PeftFolder,
    adapter_folder,
    open_peft_folder,
    read_peft_folder,
)
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState


def check(config: RunConfig) -> None:
    """Refuse an adapter that a run cannot start from, as far as it tells without the model.

    Raises:
        ConfigError, AdapterError: it is not there, is no adapter, or has another variant, rank or scaling.
    """
    if config.lora.init is not None:
        _opened(config)


def begun(config: RunConfig, fresh: ServerState, labels: tuple[str, ...]) -> ServerState:
    """The state before training with the adapter that a run starts from, and its base update if it has one.

    Args:
        config: of the run.
        fresh: the state with a fresh adapter on the same model.
        labels: of the run, in their order.

    Raises:
        ConfigError, AdapterError: as `check`, or it does not fit the model, or has a head for other labels.
    """
    if config.lora.init is None:
        return fresh
    found = _opened(config)
    adapter, update = read_peft_folder(found.path), BaseUpdate.read(found.path)
    if fresh.adapter.head and (found.path / DESCRIPTION).is_file():
        theirs = description(found.path).labels
        if tuple(theirs) != labels:
            raise AdapterError(
                f"lora.init={config.lora.init} has a head for the labels {_short(theirs)}, and the data has "
                f"{_short(labels)}; start from an adapter for these, or without"
            )
    adapter.check_like(fresh.adapter, f"lora.init={config.lora.init}")
    return replace(fresh, adapter=adapter, base=update, base_step=update)


def _opened(config: RunConfig) -> PeftFolder:
    lora = config.lora
    found = open_peft_folder(_folder(str(lora.init)))
    where, strategy = f"lora.init={lora.init}", config.strategy
    if registry.find(strategy).traits.trains_core:
        raise ConfigError(f"{where}: strategy={strategy} trains a matrix between factors of its own; leave it out")
    if found.variant != lora.variant:
        raise ConfigError(f"{where} is an adapter of lora.variant={found.variant}, and {lora.variant} is set; set that")
    _check_model(config, found, where)
    ranks = {rank for _, rank, _ in found.shapes.values()}
    if ranks != {lora.highest_rank}:
        key = "lora.ranks" if lora.ranks else "lora.rank"
        raise ConfigError(
            f"{where} has rank {', '.join(map(str, sorted(ranks)))}, and {key} is {lora.highest_rank}; start from one "
            "rank in all modules, and set it"
        )
    if lora.variant != "hira" and not math.isclose(found.scaling, lora.scaling, rel_tol=1e-6):
        raise ConfigError(
            f"{where} has scaling {found.scaling:g}, and lora.alpha={lora.alpha:g} with lora.rank={lora.rank} gives "
            f"{lora.scaling:g}; set lora.alpha={found.scaling / lora.scaling * lora.alpha:g}"
        )
    return found


def _check_model(config: RunConfig, found: PeftFolder, where: str) -> None:
    """Another model by its name; a folder may hold any, of which the shapes tell."""
    if not (found.path / DESCRIPTION).is_file():
        return
    theirs = description(found.path).model.name
    if theirs != config.model.name and not any(Path(name).is_dir() for name in (theirs, config.model.name)):
        raise ConfigError(f"{where} is an adapter for {theirs}, and model.name is {config.model.name}; set it to that")


def _folder(name: str) -> Path:
    """The folder of an adapter: itself, or that of a run.

    Raises:
        ConfigError: there is none.
    """
    if name.startswith(REGISTRY):
        raise ConfigError(
            f"lora.init={name} is looked up by `fedlora run` and its deployments; elsewhere give the folder of an "
            "adapter (mlflow_tracking.champion.download writes one)"
        )
    folder = adapter_folder(Path(name).expanduser())
    if folder is None:
        raise ConfigError(
            f"lora.init={name}: no adapter there; expected a folder with {WEIGHTS}, or that of a finished run"
        )
    return folder


def _short(labels: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(labels[:4])
    return f"{shown}, … ({len(labels)})" if len(labels) > 4 else shown
