"""The server's step in a round around every strategy: aggregate, average what else is sent, and measure."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from fedlora.adapter import Factors
from fedlora.adapter.base_update import BaseUpdate
from fedlora.adapter.divergence import Divergence, measure
from fedlora.adapter.factors import ProductSum
from fedlora.adapter.updates import Updates
from fedlora.strategies.base import Strategy
from fedlora.strategies.state import ServerState


@dataclass(frozen=True)
class Step:
    """What came of a server step: the new state, the divergence of what clients will hold, and the seconds of each."""

    state: ServerState
    divergence: Divergence
    seconds: float
    divergence_seconds: float


def step(strategy: Strategy, state: ServerState, updates: Updates, svd_order: bool = False) -> Step:
    """Aggregate the updates of a round and measure the divergence; depends on nothing but its arguments (see `advance`
    and `measure_round`)."""
    begun = time.perf_counter()
    new = advance(strategy, state, updates, svd_order)
    aggregated = time.perf_counter()
    divergence = measure_round(strategy, new, updates)
    return Step(new, divergence, aggregated - begun, time.perf_counter() - aggregated)


def advance(strategy: Strategy, state: ServerState, updates: Updates, svd_order: bool = False) -> ServerState:
    """One server step: aggregate the factors, average what else is sent, note the ranks, count the round.

    Args:
        strategy: how the factors are combined.
        state: after the last round.
        updates: this round's uploads.
        svd_order: turn the global factors (their product unchanged) so that the first indices are the best truncation.
    """
    sent = strategy.plan(state.round + 1).up
    new = strategy.aggregate(replace(state, base_step=BaseUpdate()), updates)
    if svd_order and not strategy.traits.in_svd_order:
        new = new.with_factors({m: _ordered(pair) for m, pair in new.adapter.factors.items()}, new.diagnostics)
    if "head" in sent:
        new = new.with_head(updates.mean_head())
    if "magnitude" in sent:
        new = new.with_magnitudes(updates.mean_magnitudes())
    uploaded = {client: adapter.rank for client, adapter in zip(updates.clients, updates.adapters, strict=True)}
    lower = {client: rank for client, rank in uploaded.items() if rank < state.rank_of(client)}
    return replace(new, ranks={**state.ranks, **lower}, round=state.round + 1)


def _ordered(pair: Factors) -> Factors:
    """The same product with its largest directions first; a start from B = 0 has no order and stays as it is."""
    return ProductSum.of([pair], [1.0]).truncated(pair.rank).balanced() if pair.B.any() else pair


def measure_round(strategy: Strategy, new: ServerState, updates: Updates) -> Divergence:
    """The divergence of what the clients of a round will hold, from the state after it."""
    mixing = {module: values["p"] for module, values in new.diagnostics.items() if "p" in values}
    common = strategy.broadcasts_to_all
    keys = [new.rank_of(client) if common else client for client in updates.clients]
    sent = {
        key: strategy.broadcast(new, u).folded() for key, u in dict(zip(keys, updates.clients, strict=True)).items()
    }
    broadcasts = [sent[key] for key in keys]
    return measure(updates.folded(), broadcasts, mixing, new.base_step, new.scaling, new.scalings, common)
