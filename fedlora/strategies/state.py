"""All that a strategy knows between rounds: a value, and the named tensors and small values as which it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.base_update import BaseUpdate
from fedlora.adapter.factors import keep_trainable
from fedlora.errors import AdapterError
from fedlora.files.limits import clean


@dataclass(frozen=True)
class ServerState:
    """All that a strategy knows between rounds.

    `adapter` is the global adapter (fp32) at the highest rank; `personal` holds what single clients keep for
    themselves; `base` is all that was added to the frozen base so far, `base_step` what the last round added;
    `memory` holds whatever else a strategy must remember; `diagnostics[module]` small tensors of the last aggregation
    that are worth showing (`p`: the weights with which clients' B entered, where not their own).
    `ranks` are those of clients that have not the highest; `scaling` is s, the same for every rank; `scalings` those of
    modules that have another (adapters from elsewhere may; see `scaling_of`); `seed` is the key of whatever a strategy
    draws.
    """

    adapter: Adapter
    personal: Mapping[int, Adapter] = field(default_factory=dict)
    diagnostics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    round: int = 0
    base: BaseUpdate = field(default_factory=BaseUpdate)
    base_step: BaseUpdate = field(default_factory=BaseUpdate)
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    ranks: Mapping[int, int] = field(default_factory=dict)
    scaling: float = 1.0
    seed: int = 0
    scalings: Mapping[str, float] = field(default_factory=dict)

    def scaling_of(self, module: str) -> float:
        """The s of a module."""
        return self.scalings.get(module, self.scaling)

    def rank(self, module: str) -> int:
        """The rank of the global factors of a module."""
        return self.adapter.factors[module].rank

    def rank_of(self, client: int) -> int:
        """The rank at which a client trains (in modules that have as many)."""
        return self.ranks.get(client, self.adapter.rank)

    def with_factors(
        self, factors: Mapping[str, Factors], diagnostics: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> ServerState:
        """The state with new global factors, stored in fp32, as they are sent.

        Factors of a lower rank than before are filled up so that the product stays and every direction can be trained.
        """
        old = self.adapter.factors
        stored = {module: keep_trainable(pair.to(torch.float32), old[module]) for module, pair in factors.items()}
        return replace(self, adapter=self.adapter.with_factors(stored), diagnostics=diagnostics or {})

    def with_base(self, step: Mapping[str, Factors]) -> ServerState:
        """The state with `step` added to the base: left (d_out × k), right (k × d_in) by module, scaling included.

        Factors of a rank that is not below min(d_out, d_in) become one dense matrix beside an identity.
        """
        update = BaseUpdate.of(step)
        return replace(self, base=self.base.plus(update), base_step=update)

    def with_cores(self, cores: Mapping[str, Tensor]) -> ServerState:
        """The state with new cores between the global factors (stored in fp32)."""
        stored = {module: core.to(torch.float32) for module, core in cores.items()}
        return replace(self, adapter=replace(self.adapter, cores=stored))

    def with_head(self, head: Mapping[str, Tensor]) -> ServerState:
        """The state with a new global head (stored in fp32)."""
        stored = {name: tensor.to(torch.float32) for name, tensor in head.items()}
        return replace(self, adapter=replace(self.adapter, head=stored))

    def with_magnitudes(self, magnitudes: Mapping[str, Tensor]) -> ServerState:
        """The state with new DoRA magnitudes (stored in fp32)."""
        stored = {module: vector.to(torch.float32) for module, vector in magnitudes.items()}
        return replace(self, adapter=replace(self.adapter, magnitudes=stored))


def tensors(state: ServerState) -> dict[str, Tensor]:
    """All tensors of a state: `global/…`, `personal/<client>/…`, `base/…`, `base_step/…`, `memory/…` and
    `diagnostics/<module>/…`."""
    named = _under("global", state.adapter.tensors())
    for client, adapter in state.personal.items():
        named |= _under(f"personal/{client}", adapter.tensors())
    named |= _under("base", state.base.tensors()) | _under("base_step", state.base_step.tensors())
    named |= _under("memory", state.memory)
    for module, values in state.diagnostics.items():
        named |= _under(f"diagnostics/{module}", values)
    return named


def scalars(state: ServerState) -> dict[str, Any]:
    """What is not a tensor, for JSON."""
    ranks = {str(client): rank for client, rank in state.ranks.items()}
    return {"round": state.round, "scaling": state.scaling, "seed": state.seed, "ranks": ranks}


def from_tensors(named: Mapping[str, Tensor], values: Mapping[str, Any]) -> ServerState:
    """The inverse of `tensors` and `scalars`.

    Raises:
        AdapterError: they are not those of a state.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        kind, _, rest = name.partition("/")
        parts.setdefault(kind, {})[rest] = tensor
    try:
        return ServerState(
            adapter=Adapter.from_tensors(parts.get("global", {})),
            personal={int(u): Adapter.from_tensors(own) for u, own in _nested(parts.get("personal", {}), 0).items()},
            diagnostics=_nested(parts.get("diagnostics", {}), -1),
            round=values["round"],
            base=BaseUpdate.from_tensors(parts.get("base", {})),
            base_step=BaseUpdate.from_tensors(parts.get("base_step", {})),
            memory=parts.get("memory", {}),
            ranks={int(client): rank for client, rank in values["ranks"].items()},
            scaling=values["scaling"],
            seed=values["seed"],
        )
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"this is no server's state: {clean(repr(error))}") from None


def as_stored(state: ServerState) -> ServerState:
    """The state as whoever reads it again has it: every tensor in memory, contiguous, on no file of anybody's."""
    return from_tensors({name: tensor.contiguous() for name, tensor in tensors(state).items()}, scalars(state))


def _under(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in named.items()}


def _nested(named: Mapping[str, Tensor], cut: int) -> dict[str, dict[str, Tensor]]:
    """Names cut at their first (0) or last (-1) slash, by their front."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        front, back = name.split("/", 1) if cut == 0 else name.rsplit("/", 1)
        found.setdefault(front, {})[back] = tensor
    return found
