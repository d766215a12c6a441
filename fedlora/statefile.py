"""A `ServerState` as named tensors and small values, the form in which it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedlora.adapter import Adapter
from fedlora.base_update import BaseUpdate
from fedlora.errors import AdapterError
from fedlora.limits import clean
from fedlora.strategies.base import ServerState


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


def _under(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in named.items()}


def _nested(named: Mapping[str, Tensor], cut: int) -> dict[str, dict[str, Tensor]]:
    """Names cut at their first (0) or last (-1) slash, by their front."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        front, back = name.split("/", 1) if cut == 0 else name.rsplit("/", 1)
        found.setdefault(front, {})[back] = tensor
    return found
