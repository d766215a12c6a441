"""Aggregating adapters that were trained anywhere: PEFT folders in, a PEFT folder (and a base update) out.

    result = fedlora.aggregate(["alice/", "bob/"], strategy="flora-na", weights=[3, 1])
    result.save("global/")

No training and no base model. Clients are read one module at a time, so that memory does not grow with their number for
strategies that allow it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedlora.adapter.base_update import FILE
from fedlora.adapter.factors import fresh_factors
from fedlora.adapter.updates import Update, Updates
from fedlora.adapter.weights import Adapter, wire_size
from fedlora.errors import AdapterError, ConfigError
from fedlora.exchange.aggregation_checks import check_alike, check_possible, checked_weights
from fedlora.exchange.alignment import Alignment, aligned, ratios_of, union_of_tokens
from fedlora.exchange.peftfolder import PeftFolder, open_peft_folder
from fedlora.exchange.result import Aggregated
from fedlora.files.limits import UPLOAD, Limits
from fedlora.metrics import Bytes
from fedlora.seeds import torch_generator
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.step import advance, measure_round


def aggregate(
    paths: Sequence[str | Path],
    strategy: str = "fedit",
    weights: Sequence[float] | None = None,
    ranks: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    limits: Limits = UPLOAD,
    base: Any = None,
) -> Aggregated:
    """Aggregate PEFT adapter folders.

    Args:
        paths: the clients' folders (adapter_config.json, adapter_model.safetensors), of one variant and the same
            modules; ranks and alpha/r may differ where the strategy allows it.
        strategy: a name of `fedlora strategies`.
        weights: one per client, non-negative, for example their numbers of examples; equal without it.
        ranks: the rank at which each client goes on; its own without it.
        options: of the strategy.
        seed: of what a strategy draws (`flora`: the fresh adapter).
        limits: what a client's file may hold (`fedlora.files.limits`).
        base: the base model, its folder or hub id; needed only where clients trained rows of different tokens.

    Raises:
        ConfigError: an unknown strategy or option, or one that needs what folders do not hold.
        AdapterError: names the client and the tensor: a value that is not finite, a module that is missing or too many,
            shapes that do not match, a file that is not safetensors, impossible weights or ranks.
    """
    chosen = registry.make(strategy, options)
    if chosen.traits.pools_data:
        raise ConfigError(f"strategy {strategy} trains one client on everybody's data; there is nothing to aggregate")
    clients = tuple(open_peft_folder(Path(path), limits) for path in paths)
    for client in clients:
        if os.path.lexists(client.path / FILE):
            raise AdapterError(
                f"{client.path} has a base update ({FILE}), without which its adapter is not what was learned; "
                "adapters that start from different bases have no mean"
            )
    given = checked_weights(weights, clients)
    check_alike(clients)
    check_possible(chosen, clients, ranks)
    alignment = _alignment(chosen, clients, given)
    adapters = aligned(clients, given, alignment, base)
    state = _start(chosen, clients, adapters, alignment, ranks, seed)
    updates = Updates.collect(
        Update(index, weight, adapter) for index, (adapter, weight) in enumerate(zip(adapters, given, strict=True))
    )
    begun = time.perf_counter()
    new = advance(chosen, state, updates)
    seconds = time.perf_counter() - begun
    new = replace(new, ranks=state.ranks)
    _check_result(chosen, new)
    divergence = measure_round(chosen, new, updates)
    return Aggregated(chosen, clients, updates, new, divergence, _sent(chosen, state, new, clients), seconds, alignment)


def _check_result(strategy: Strategy, new: ServerState) -> None:
    for name, tensor in (new.adapter.tensors() | new.base_step.tensors()).items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"the result of {strategy.name} for tensor '{name}' is too large for fp32; do the clients' values make "
                "sense?"
            )


def _alignment(strategy: Strategy, clients: Sequence[PeftFolder], weights: Sequence[float]) -> Alignment:
    """The result has the scalings of the first client of the highest rank; clients of others are brought to them."""
    scalings = max(clients, key=lambda client: client.rank).scalings
    ratios = ratios_of(clients, scalings)
    part = strategy.rescaled([client.adapter for client in clients]) if any(ratios) else "B"
    averaged = "head" in strategy.plan(1).up
    return Alignment(scalings, ratios, part, union_of_tokens(clients, weights) if averaged else {})


def _start(
    strategy: Strategy,
    clients: Sequence[PeftFolder],
    adapters: Sequence[Adapter],
    alignment: Alignment,
    ranks: Sequence[int] | None,
    seed: int,
) -> ServerState:
    """The state before the round, as far as the uploads tell: B = 0 beside the factor that clients share, if they do,
    or a fresh random A."""
    own = list(ranks or (client.rank for client in clients))
    extra = max(own) if ranks else 0
    highest = max(clients, key=lambda client: client.rank)
    factors = {}
    for position, module in enumerate(highest.shapes):
        d_out, _, d_in = highest.shapes[module]
        uploaded = max(client.shapes[module][1] for client in clients)
        rank = max(extra, uploaded)
        if rank > max(uploaded, min(d_out, d_in)):
            raise AdapterError(
                f"ranks: {rank} is above the smaller side of module '{module}' ({d_out} × {d_in}); choose at most that"
            )
        generator = torch_generator(seed, "start", 0, position)
        factors[module] = fresh_factors((d_out, d_in), rank, generator=generator)
    first = adapters[0]
    adapter = Adapter(factors, dict(first.head), dict(first.magnitudes), first.kinds)
    scaling = alignment.scalings[max(highest.shapes, key=lambda module: highest.shapes[module][1])]
    others = {module: s for module, s in alignment.scalings.items() if not math.isclose(s, scaling, rel_tol=1e-9)}
    state = ServerState(adapter, scaling=scaling, seed=seed, ranks=dict(enumerate(own)), scalings=others)
    return strategy.resume(state, [(str(client.path), own) for client, own in zip(clients, adapters, strict=True)])


def _sent(strategy: Strategy, before: ServerState, new: ServerState, clients: Sequence[PeftFolder]) -> Bytes:
    """What a round like this sends: every client's upload, and what each receives for the next."""
    sent, received = strategy.plan(before.round + 1).up, strategy.plan(new.round + 1).down
    sizes: dict[Hashable, tuple[int, int]] = {}  # by shapes: thousands of clients have the same few
    up, down = [], []
    for index, client in enumerate(clients):
        shapes = ("up", tuple(client.stored.layout()))
        if shapes not in sizes:
            sizes[shapes] = wire_size(client.adapter, sent)
        up.append(sizes[shapes])
        adapter = strategy.broadcast(new, index)
        ranks = ("down", tuple(pair.rank for pair in adapter.factors.values()))
        if ranks not in sizes:
            sizes[ranks] = wire_size(adapter, received)
        down.append(sizes[ranks])
    return Bytes(
        up_adapter=sum(a for a, _ in up),
        up_head=sum(h for _, h in up),
        down_adapter=sum(a for a, _ in down),
        down_head=sum(h for _, h in down),
        down_base=new.base_step.wire_bytes() * len(clients),
    )
