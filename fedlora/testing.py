"""A conformance test for strategies, to be run by those who write them.

    from fedlora.testing import check_strategy

    def test_conforms():
        check_strategy("my-strategy")            # installed, by its name
        check_strategy(MyStrategy(), seed=7)     # or an instance

It plays federated rounds with simulated clients on tiny non-square layers, and holds the strategy to the contract of
`fedlora.strategies.base` and to what the class says of itself (`exact`, `personal`, `changes_base`, `one_rank`, costs).
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.adapter.updates import Update, Updates
from fedlora.adapter.weights import EVERY_PART, Adapter, Factors, parse_name
from fedlora.errors import counted
from fedlora.strategies import registry
from fedlora.strategies import state as states
from fedlora.strategies.base import Family, ServerState, Strategy
from fedlora.strategies.step import advance, measure_round

SHAPES = {"encoder.query": (24, 17), "encoder.up": (19, 33)}
RANK, SCALING = 4, 3.0


@dataclass(frozen=True)
class Setting:
    """Who takes part: the clients' ranks and example counts."""

    name: str
    ranks: tuple[int, ...]
    examples: tuple[int, ...]


EQUAL = Setting("equal ranks", (4, 4, 4, 4, 4), (30, 10, 7, 25, 3))
MIXED = Setting("mixed ranks", (2, 4, 3, 4, 1), (30, 10, 7, 25, 3))
ALONE = Setting("a single client", (4,), (11,))


def check_strategy(strategy: str | Strategy, seed: int = 0) -> None:
    """Raise an AssertionError that lists everything in which a strategy does not keep to the contract.

    Args:
        strategy: an installed strategy's name (then its entry point and options are checked too), or an instance.
        seed: of the simulated clients.

    Raises:
        AssertionError: one line per problem.
    """
    found = problems(strategy, seed)
    assert not found, f"{counted(len(found), 'problem')}:\n" + "\n".join(f"- {problem}" for problem in found)


def problems(strategy: str | Strategy, seed: int = 0) -> list[str]:
    """What `check_strategy` would complain of; empty for a strategy that conforms."""
    chosen = registry.make(strategy) if isinstance(strategy, str) else strategy
    found = list(_description(chosen))
    if found:
        return found
    for setting in _settings(chosen):
        try:
            found += [f"{setting.name}: {problem}" for problem in _rounds(chosen, setting, seed)]
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            found.append(f"{setting.name}: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})")
    return found


def _settings(strategy: Strategy) -> list[Setting]:
    if strategy.traits.pools_data:
        return [ALONE]
    return [EQUAL, ALONE] if strategy.traits.one_rank else [EQUAL, ALONE, MIXED]


def _description(strategy: Strategy) -> Iterator[str]:
    for name, kind in (("name", str), ("summary", str), ("source", str), ("family", Family), ("exact", bool)):
        if not isinstance(getattr(strategy, name, None), kind):
            yield f"class attribute '{name}' should be a {kind.__name__}"
    for name, field in type(strategy).Options.model_fields.items():
        if not field.description:
            yield f"option '{name}' has no docstring"
        if field.is_required():
            yield f"option '{name}' has no default"


# -- simulated federation -------------------------------------------------------------------------------------------


def fresh_state(setting: Setting, seed: int = 0, scaling: float = SCALING) -> ServerState:
    """The state before round one: A random, B zero, a head of one vector."""
    g = torch.Generator().manual_seed(1000 + seed)
    factors = {
        module: Factors(torch.zeros(d_out, RANK), torch.randn(RANK, d_in, generator=g) / d_in**0.5)
        for module, (d_out, d_in) in SHAPES.items()
    }
    adapter = Adapter(factors, {"classifier.bias": torch.randn(3, generator=g)})
    ranks = dict(enumerate(setting.ranks)) if len(set(setting.ranks)) > 1 else {}
    return ServerState(adapter, scaling=scaling, seed=seed, ranks=ranks)


def begin(strategy: Strategy, setting: Setting, seed: int = 0) -> ServerState:
    """What the strategy makes of the fresh state, over random base weights."""

    def weight(module: str) -> Tensor:
        g = torch.Generator().manual_seed(2000 + seed + sorted(SHAPES).index(module))
        return torch.randn(SHAPES[module], generator=g)

    return strategy.begin(fresh_state(setting, seed), weight)


def train(strategy: Strategy, state: ServerState, client: int, seed: int = 0) -> Adapter:
    """A client's upload of the next round: what it was sent, with the parts that it trains moved at random."""
    start, parts = strategy.broadcast(state, client), strategy.plan(state.round + 1).trains
    g = torch.Generator().manual_seed(3000 + 97 * seed + 13 * state.round + client)
    moved = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=g) if parse_name(name).part in parts else tensor
        for name, tensor in start.tensors().items()
    }
    return strategy.after_training(start, Adapter.from_tensors(moved))


def upload(strategy: Strategy, state: ServerState, setting: Setting, seed: int = 0) -> Updates:
    """A round's uploads of all clients of a setting."""
    return Updates.collect(
        Update(client, examples, train(strategy, state, client, seed))
        for client, examples in enumerate(setting.examples)
    )


def _rounds(strategy: Strategy, setting: Setting, seed: int) -> Iterator[str]:
    """Three rounds, from B = 0; everything that is wrong in any of them."""
    state = begin(strategy, setting, seed)
    yield from _broadcasts(strategy, state, setting)
    for _ in range(3):
        updates = upload(strategy, state, setting, seed)
        new = advance(strategy, state, updates)
        where = f"round {new.round}"
        if not _finite(new):
            yield f"{where}: the new state has values that are not finite"
            return
        for problem in (
            *_pure(strategy, state, updates, new),
            *_claims(strategy, setting, updates, new),
            *_broadcasts(strategy, new, setting),
            *_storable(strategy, new, setting, seed),
        ):
            yield f"{where}: {problem}"
        state = new
    nothing = Updates(updates.clients, tuple(strategy.broadcast(state, u) for u in updates.clients), updates.weights)
    if not _finite(advance(strategy, state, nothing)):
        yield "uploads in which nothing changed give values that are not finite"


def _pure(strategy: Strategy, state: ServerState, updates: Updates, new: ServerState) -> Iterator[str]:
    before = {name: tensor.clone() for name, tensor in states.tensors(state).items()}
    given = [{name: tensor.clone() for name, tensor in adapter.tensors().items()} for adapter in updates.adapters]
    again = advance(strategy, state, updates)
    if not _same(states.tensors(new), states.tensors(again)):
        yield "the same state and uploads gave another result the second time: something is kept in the strategy"
    if not _same(before, states.tensors(state)):
        yield "aggregate changed the state that it was given"
    if not all(_same(old, adapter.tensors()) for old, adapter in zip(given, updates.adapters, strict=True)):
        yield "aggregate changed the uploads that it was given"


def _claims(strategy: Strategy, setting: Setting, updates: Updates, new: ServerState) -> Iterator[str]:
    rho = measure_round(strategy, new, updates).rho
    if strategy.traits.exact and len(set(setting.ranks)) == 1 and rho > 1e-6:
        yield f"exact is True, but ρ is {rho:.2g}"
    if not strategy.traits.changes_base and new.base_step:
        yield "changes_base is False, but the base was updated"
    if not strategy.traits.personal and new.personal:
        yield "personal is False, but the state holds adapters of single clients"
    if (not strategy.traits.personal or strategy.broadcasts_to_all) and len(set(setting.ranks)) == 1:
        sent = [strategy.broadcast(new, client).tensors() for client in updates.clients]
        if not all(_same(sent[0], other) for other in sent[1:]):
            yield "personal is False or common_broadcast True, but clients of one rank receive different adapters"


def _broadcasts(strategy: Strategy, state: ServerState, setting: Setting) -> Iterator[str]:
    for client, rank in enumerate(setting.ranks):
        sent = strategy.broadcast(state, client)
        if sent.modules != state.adapter.modules or sent.head.keys() != state.adapter.head.keys():
            yield f"client {client} receives other modules or heads than the model has"
        for module, pair in sent.factors.items():
            if pair.shape != SHAPES[module] or pair.rank > rank:
                yield f"client {client} of rank {rank} receives {pair.shape} of rank {pair.rank} for '{module}'"
            idle = (pair.B == 0).all(dim=0) & (pair.A == 0).all(dim=1)
            if idle.any():
                yield f"'{module}': B and A are both zero in {counted(int(idle.sum()), 'direction')}"
        dtypes = {tensor.dtype for tensor in sent.tensors(EVERY_PART).values()}
        if dtypes != {torch.float32}:
            yield f"client {client} receives {sorted(map(str, dtypes))}; adapters are sent in float32"


def _storable(strategy: Strategy, state: ServerState, setting: Setting, seed: int) -> Iterator[str]:
    """A state that was written and read again goes on as if nothing had happened: what resuming rests on."""
    read = states.from_tensors(states.tensors(state), states.scalars(state))
    here, there = (advance(strategy, each, upload(strategy, each, setting, seed)) for each in (state, read))
    if not _same(states.tensors(here), states.tensors(there)):
        yield "after writing and reading the state the next round differs: something is not in ServerState"


def _finite(state: ServerState) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in states.tensors(state).values())


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
