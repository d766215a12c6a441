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
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fedlora.adapter import Adapter, Factors, wire_size
from fedlora.base_update import FILE, BaseUpdate
from fedlora.divergence import Divergence
from fedlora.errors import AdapterError, ConfigError
from fedlora.limits import UPLOAD, Limits
from fedlora.metrics import Bytes
from fedlora.peftfolder import PeftFolder, open_peft_folder
from fedlora.rounds import measure_round
from fedlora.seeds import torch_generator
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState, Strategy, advance
from fedlora.updates import Update, Updates


@dataclass(frozen=True)
class Aggregated:
    """What came of an aggregation; `save` writes it, `report` is its JSON content."""

    strategy: Strategy
    clients: tuple[PeftFolder, ...]
    updates: Updates
    state: ServerState
    divergence: Divergence
    bytes: Bytes
    seconds: float

    @property
    def weights(self) -> tuple[float, ...]:
        """The clients' weights, normalised."""
        return tuple(self.updates.weights.tolist())

    @property
    def adapter(self) -> Adapter | None:
        """The global adapter at the highest rank; None where clients keep adapters of their own."""
        return None if self.strategy.personal else self.state.adapter

    @property
    def base(self) -> BaseUpdate:
        """What is to be added to the base weights; empty for most strategies."""
        return self.state.base_step

    @cached_property
    def global_rho(self) -> float:
        """ρ of the global adapter: lower than that of what clients receive where some have a lower rank."""
        if all(self.state.rank_of(index) == self.state.adapter.rank for index in range(len(self.clients))):
            return self.divergence.rho
        whole = replace(self.state, ranks={})
        return measure_round(self.strategy, whole, self.updates).rho

    @property
    def notes(self) -> list[str]:
        """What does not stop an aggregation, but should be known."""
        bases = sorted({str(client.config.get("base_model_name_or_path")) for client in self.clients})
        if len(bases) == 1:
            return []
        return [f"the adapters name different base models ({', '.join(bases[:3])}); they are taken to be the same"]

    def client(self, index: int) -> Adapter:
        """What the client at a position of the list goes on with, at its own rank."""
        return self.strategy.broadcast(self.state, index)

    def report(self) -> dict[str, Any]:
        """`strategy`, `clients`, `rho` (model and by module), `abo`, `bytes` and `seconds`.

        `rho.model` is of what clients receive, each at its own rank; `rho.global` of the global adapter as written.
        A ratio to a mean update of zero is None (null in JSON) where it is not 0/0.
        """
        found = self.divergence
        clients = zip(self.clients, self.weights, strict=True)
        return {
            "strategy": self.strategy.name,
            "clients": [{"path": str(c.path), "rank": c.rank, "weight": weight} for c, weight in clients],
            "rho": {
                "model": _number(found.rho),
                "floor": _number(found.floor),
                "excess": _number(found.excess),
                "global": None if self.adapter is None else _number(self.global_rho),
                "modules": {
                    name: {
                        "rho": _number(m.rho),
                        "floor": _number(m.floor),
                        "effective_clients": m.effective_clients,
                    }
                    for name, m in found.modules.items()
                },
            },
            "abo": {"R": found.R, "P": found.P, "Q": found.Q, "dispersion": found.dispersion},
            "bytes": asdict(self.bytes),
            "seconds": self.seconds,
        }

    def save(self, out: str | Path, per_client: bool = False, report: str | Path | None = None) -> None:
        """Write `out` (and the report) as a whole or not at all; see `fedlora.aggregation_files`.

        Raises:
            AdapterError: `out` is there already, or there is no global adapter and `per_client` is not set.
            RunFolderError: it cannot be written.
        """
        from fedlora import aggregation_files

        aggregation_files.write(self, Path(out), per_client, Path(report) if report else None)


def aggregate(
    paths: Sequence[str | Path],
    strategy: str = "fedit",
    weights: Sequence[float] | None = None,
    ranks: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    limits: Limits = UPLOAD,
) -> Aggregated:
    """Aggregate PEFT adapter folders.

    Args:
        paths: the clients' folders (adapter_config.json, adapter_model.safetensors), of one variant, the same modules
            and one alpha/r; ranks may differ where the strategy allows it.
        strategy: a name of `fedlora strategies`.
        weights: one per client, non-negative, for example their numbers of examples; equal without it.
        ranks: the rank at which each client goes on; its own without it.
        options: of the strategy.
        seed: of what a strategy draws (`flora`: the fresh adapter).
        limits: what a client's file may hold (`fedlora.limits`).

    Raises:
        ConfigError: an unknown strategy or option, or one that needs what folders do not hold.
        AdapterError: names the client and the tensor: a value that is not finite, a module that is missing or too many,
            shapes that do not match, mixed alpha/r, a file that is not safetensors, impossible weights or ranks.
    """
    chosen = registry.make(strategy, options)
    if chosen.pools_data:
        raise ConfigError(f"strategy {strategy} trains one client on everybody's data; there is nothing to aggregate")
    clients = tuple(open_peft_folder(Path(path), limits) for path in paths)
    for client in clients:
        if os.path.lexists(client.path / FILE):
            raise AdapterError(
                f"{client.path} has a base update ({FILE}), without which its adapter is not what was learned; "
                "adapters that start from different bases have no mean"
            )
    given = _weights(weights, clients)
    _check_alike(clients)
    _check_possible(chosen, clients, ranks)
    state = _start(chosen, clients, ranks, seed)
    updates = Updates.collect(
        Update(index, weight, client.adapter) for index, (client, weight) in enumerate(zip(clients, given, strict=True))
    )
    begun = time.perf_counter()
    new = advance(chosen, state, updates)
    seconds = time.perf_counter() - begun
    new = replace(new, ranks=state.ranks)
    _check_result(chosen, new)
    divergence = measure_round(chosen, new, updates)
    return Aggregated(chosen, clients, updates, new, divergence, _sent(chosen, state, new, clients), seconds)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _weights(weights: Sequence[float] | None, clients: Sequence[PeftFolder]) -> Sequence[float]:
    if not clients:
        raise AdapterError("there is no client folder to aggregate; name at least one")
    if weights is None:
        return [1.0] * len(clients)
    if len(weights) != len(clients):
        raise AdapterError(f"{len(weights)} weights for {len(clients)} clients; give one each, in the same order")
    for client, weight in zip(clients, weights, strict=True):
        if not 0 <= weight < float("inf"):
            raise AdapterError(f"{client.path}: its weight {weight:g} is not allowed; expected a finite number from 0")
    if not any(weights):
        raise AdapterError("all weights are zero; at least one client needs a positive weight")
    if math.isinf(sum(weights)):
        raise AdapterError("the weights are too large to be added up; only their proportions matter")
    return weights


def _check_alike(clients: Sequence[PeftFolder]) -> None:
    """Every client has the variant, scaling, modules and shapes of the first, and finite values."""
    first = clients[0]
    for client in clients:
        if client.variant != first.variant:
            raise AdapterError(f"{client.path} is a {client.variant} adapter, but {first.path} is {first.variant}")
        _same_names(client.path, client.shapes, first.path, first.shapes, "module")
        _same_names(client.path, client.head_shapes, first.path, first.head_shapes, "tensor")
        if abs(client.scaling - first.scaling) > 1e-9 * first.scaling:
            raise AdapterError(
                f"{client.path} has alpha/r {client.scaling:g}, but {first.path} has {first.scaling:g}; "
                "products B·A of different scaling have no mean"
            )
        for module, (d_out, _, d_in) in client.shapes.items():
            if client.adapter.kinds.get(module) != first.adapter.kinds.get(module):
                raise AdapterError(f"{client.path}: module '{module}' is of another kind of layer than in {first.path}")
            wanted = first.shapes[module]
            if (d_out, d_in) != (wanted[0], wanted[2]):
                raise AdapterError(
                    f"{client.path}: module '{module}' is {d_out} × {d_in}, but {wanted[0]} × {wanted[2]} in "
                    f"{first.path}"
                )
        for name, shape in client.head_shapes.items():
            _same_shape(client.path, f"tensor '{name}'", shape, first.path, first.head_shapes[name])
        for module, shape in client.magnitude_shapes.items():
            what = f"the magnitude vector of module '{module}'"
            _same_shape(client.path, what, shape, first.path, first.magnitude_shapes[module])
        for name, tensor in client.stored.items():
            if not torch.isfinite(tensor.to(torch.float32)).all():
                raise AdapterError(
                    f"{client.path}: tensor '{name}' has values that are not finite in fp32; leave the client out"
                )


def _same_names(path: Path, mine: Mapping[str, Any], first: Path, theirs: Mapping[str, Any], what: str) -> None:
    for name in sorted(theirs.keys() ^ mine.keys()):
        state = "is missing" if name in theirs else "is not expected"
        raise AdapterError(f"{path}: {what} '{name}' {state} (compared with {first})")


def _same_shape(path: Path, what: str, shape: tuple[int, ...], first: Path, wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise AdapterError(f"{path}: {what} has shape {shape}, but {wanted} in {first}")


def _check_possible(strategy: Strategy, clients: Sequence[PeftFolder], ranks: Sequence[int] | None) -> None:
    if ranks is not None and (len(ranks) != len(clients) or min(ranks) < 1):
        raise AdapterError(f"ranks {list(ranks)} for {len(clients)} clients; give one each, from 1")
    if ranks is not None and strategy.personal:
        raise ConfigError(f"strategy {strategy.name} gives every client its own adapter back; leave the ranks out")
    kinds = {tuple(rank for _, rank, _ in client.shapes.values()) for client in clients}
    mixed = len(kinds) > 1 or any(rank != clients[0].rank for rank in ranks or ())
    reason = strategy.refusal(clients[0].variant, mixed, False)
    if reason:
        found = f"clients of rank {sorted({client.rank for client in clients})}" if mixed else clients[0].variant
        raise ConfigError(f"strategy {strategy.name} cannot aggregate these adapters ({found}): {reason}")
    for module in clients[0].shapes if strategy.changes_base else ():
        if f"{module}.base_layer.weight" in clients[0].head_shapes:
            raise ConfigError(
                f"strategy {strategy.name} changes the base, but {clients[0].path} holds the base weight of '{module}' "
                "itself, which would undo that; save the adapters with save_embedding_layers=False"
            )


def _check_result(strategy: Strategy, new: ServerState) -> None:
    for name, tensor in (new.adapter.tensors() | new.base_step.tensors()).items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"the result of {strategy.name} for tensor '{name}' is too large for fp32; do the clients' values make "
                "sense?"
            )


def _start(strategy: Strategy, clients: Sequence[PeftFolder], ranks: Sequence[int] | None, seed: int) -> ServerState:
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
        draw = torch.rand(rank, d_in, generator=torch_generator(seed, "start", 0, position))
        factors[module] = Factors(torch.zeros(d_out, rank), (2 * draw - 1) / d_in**0.5)
    first = clients[0].adapter
    adapter = Adapter(factors, dict(first.head), dict(first.magnitudes), first.kinds)
    state = ServerState(adapter, scaling=highest.scaling, seed=seed, ranks=dict(enumerate(own)))
    return strategy.resume(state, [(str(client.path), client.adapter) for client in clients])


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
