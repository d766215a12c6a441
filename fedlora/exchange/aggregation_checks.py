"""What is checked of adapters from anyone before they are combined: that they have a mean which a strategy can form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedlora.errors import AdapterError, ConfigError, counted
from fedlora.exchange.alignment import ratios_of
from fedlora.exchange.peftconfig import KEYS, Treatment
from fedlora.exchange.peftfolder import PeftFolder
from fedlora.files.limits import short
from fedlora.strategies import registry
from fedlora.strategies.base import Strategy


def checked_weights(weights: Sequence[float] | None, clients: Sequence[PeftFolder]) -> Sequence[float]:
    """The clients' weights, not normalised; equal where none are given.

    Raises:
        AdapterError: no client, or weights that cannot be meant.
    """
    if not clients:
        raise AdapterError("there is no client folder to aggregate; name at least one")
    if weights is None:
        return [1.0] * len(clients)
    if len(weights) != len(clients):
        raise AdapterError(
            f"{counted(len(weights), 'weight')} for {counted(len(clients), 'client')}; give one each, in the same order"
        )
    for client, weight in zip(clients, weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise AdapterError(f"{client.path}: its weight {weight:g} is not allowed; expected a finite number from 0")
    if not any(weights):
        raise AdapterError("all weights are zero; at least one client needs a positive weight")
    if math.isinf(sum(weights)):
        raise AdapterError("the weights are too large to be added up; only their proportions matter")
    return weights


def check_alike(clients: Sequence[PeftFolder]) -> None:
    """Every client has the kind of adapter, modules and shapes of the first, and finite values.

    Raises:
        AdapterError: names the client and the tensor or key.
    """
    first = clients[0]
    for client in clients:
        _check_configuration(client, first)
        _same_names(client.path, client.shapes, first.path, first.shapes, "module")
        _same_names(client.path, _whole_head(client), first.path, _whole_head(first), "tensor")
        for module, (d_out, _, d_in) in client.shapes.items():
            if client.adapter.kinds.get(module) != first.adapter.kinds.get(module):
                raise AdapterError(f"{client.path}: module '{module}' is of another kind of layer than in {first.path}")
            wanted = first.shapes[module]
            if (d_out, d_in) != (wanted[0], wanted[2]):
                raise AdapterError(
                    f"{client.path}: module '{module}' is {d_out} × {d_in}, but {wanted[0]} × {wanted[2]} in "
                    f"{first.path}"
                )
        for name, shape in _whole_head(client).items():
            _same_shape(client.path, f"tensor '{name}'", shape, first.path, first.head_shapes[name])
        for module, shape in client.magnitude_shapes.items():
            what = f"the magnitude vector of module '{module}'"
            _same_shape(client.path, what, shape, first.path, first.magnitude_shapes[module])
        for name, tensor in client.stored.items():
            if not torch.isfinite(tensor.to(torch.float32)).all():
                raise AdapterError(
                    f"{client.path}: tensor '{name}' has values that are not finite in fp32; leave the client out"
                )
    _check_rows(clients)


def _check_configuration(client: PeftFolder, first: PeftFolder) -> None:
    """What gives tensors their meaning is the same in both configurations."""
    if _kind(client) != _kind(first):
        raise AdapterError(f"{client.path} is a {client.variant} adapter, but {first.path} is {first.variant}")
    for key, known in KEYS[first.config["peft_type"]].items():
        mine, theirs = (folder.config.get(key, known.default) for folder in (client, first))
        unsaid = known.default is None and None in (mine, theirs)
        if known.treatment is Treatment.AGREE and mine != theirs and not unsaid:
            raise AdapterError(
                f"{client.path}: {key} is {short(mine)}, but {short(theirs)} in {first.path} ({known.reason}); "
                "all clients need one value"
            )


def _kind(client: PeftFolder) -> str:
    """The variant, but for the scaling, in which rsLoRA differs from LoRA."""
    return "lora" if client.variant == "rslora" else client.variant


def _whole_head(client: PeftFolder) -> dict[str, tuple[int, ...]]:
    """Shapes of the head's tensors that are not rows of single tokens."""
    return {name: shape for name, shape in client.head_shapes.items() if name not in client.tokens}


def _check_rows(clients: Sequence[PeftFolder]) -> None:
    """Rows of single tokens are of one width."""
    widths: dict[str, tuple[Path, int]] = {}
    for client in clients:
        for name in client.tokens:
            width = client.head_shapes[name][1]
            path, wanted = widths.setdefault(name, (client.path, width))
            if width != wanted:
                raise AdapterError(
                    f"{client.path}: rows of tensor '{name}' have {width} values, but {wanted} in {path}"
                )


def _same_names(path: Path, mine: Mapping[str, Any], first: Path, theirs: Mapping[str, Any], what: str) -> None:
    for name in sorted(theirs.keys() ^ mine.keys()):
        state = "is missing" if name in theirs else "is not expected"
        raise AdapterError(f"{path}: {what} '{name}' {state} (compared with {first})")


def _same_shape(path: Path, what: str, shape: tuple[int, ...], first: Path, wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise AdapterError(f"{path}: {what} has shape {shape}, but {wanted} in {first}")


def check_possible(strategy: Strategy, clients: Sequence[PeftFolder], ranks: Sequence[int] | None) -> None:
    """The strategy can be carried out with adapters of these ranks, scalings and modules.

    Raises:
        AdapterError: impossible ranks.
        ConfigError: says why the strategy cannot, and what can.
    """
    if ranks is not None and (len(ranks) != len(clients) or min(ranks) < 1):
        raise AdapterError(f"ranks {list(ranks)} for {counted(len(clients), 'client')}; give one each, from 1")
    if ranks is not None and strategy.traits.personal:
        raise ConfigError(f"strategy {strategy.name} gives every client its own adapter back; leave the ranks out")
    kinds = {tuple(rank for _, rank, _ in client.shapes.values()) for client in clients}
    mixed = len(kinds) > 1 or any(rank != clients[0].rank for rank in ranks or ())
    if refused := registry.refusal(strategy, clients[0].variant, mixed, False):
        found = f"clients of rank {sorted({client.rank for client in clients})}" if mixed else clients[0].variant
        raise ConfigError(f"strategy {strategy.name} cannot aggregate these adapters ({found}): {refused.reason}")
    _check_scalings(strategy, clients)
    if strategy.traits.changes_base:
        _check_base(strategy, clients[0])


def _check_scalings(strategy: Strategy, clients: Sequence[PeftFolder]) -> None:
    """Clients have one alpha/r by module, unless only their updates count."""
    first = clients[0]
    for client, ratios in zip(clients, ratios_of(clients, first.scalings), strict=True):
        if ratios and not strategy.traits.any_scaling:
            module = min(ratios)
            raise ConfigError(
                f"strategy {strategy.name} cannot aggregate these adapters: {client.path} has alpha/r "
                f"{client.scalings[module]:g}, but {first.path} has {first.scalings[module]:g} (module '{module}'). It "
                "combines B and A one by one, and the result would depend on which of them takes up the difference; "
                "use a strategy for which only s·B·A counts (svd, flexlora, flora, oracle), or bring the adapters to "
                "one alpha/r first"
            )


def _check_base(strategy: Strategy, client: PeftFolder) -> None:
    """What the strategy adds to base weights finds them: by the names of modules, one scaling each."""
    if len(set(client.scalings.values())) > 1 and not strategy.traits.scales_by_module:
        raise ConfigError(
            f"strategy {strategy.name} adds to the base with one alpha/r for all modules, but {client.path} has several"
        )
    for module in client.shapes:
        if f"{module}.base_layer.weight" in client.head_shapes:
            raise ConfigError(
                f"strategy {strategy.name} changes the base, but {client.path} holds the base weight of '{module}' "
                "itself, which would undo that; save the adapters with save_embedding_layers=False"
            )
        if ".base_layer." in module:
            raise ConfigError(
                f"strategy {strategy.name} changes the base, but '{module}' is a layer within one that PEFT adapts as "
                "a whole, such as nn.MultiheadAttention, whose base weights cannot be added to by name; use a strategy "
                "that leaves the base alone (svd, flexlora)"
            )
