"""The adapters and heads of several clients in one model, for one forward pass: the base's products are over all rows
at once, those of an adapter or head a client's own, batched.

Rows come client after client, as many of each (`fedlora.data.joined`), so that every tensor that reaches an adapted
layer falls into as many equal stretches as there are clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.adapter import Adapter, Factors, Part
from fedlora.adapter.weights import PEFT_PREFIX, parse_name
from fedlora.model import peftlibrary, resident
from fedlora.model.arithmetic import plain_weight
from fedlora.model.prediction import instead
from fedlora.model.resident import ResidentModel

Forward = Callable[..., Tensor]
Parameters = Mapping[str, Tensor]
"""Those of a layer by its attributes, clients × …."""


class Stack:
    """Parameters of several adapters side by side, clients × …, by the names under which PEFT saves one of them.

    Those of lower rank have zeros behind it, which have no gradient and so stay zero.
    """

    def __init__(self, model: ResidentModel, starts: Sequence[Adapter], parts: frozenset[Part]) -> None:
        self._model = model
        ranks = {module: max(start.factors[module].rank for start in starts) for module in starts[0].factors}
        padded = [
            start.with_factors(
                {module: pair.at_rank(ranks[module]) for module, pair in start.factors.items()}
            ).tensors()
            for start in starts
        ]
        dtypes = {name: getattr(*place).dtype for name, place in model.places().items()}
        self.parameters = {
            name: nn.Parameter(
                torch.stack([each[name] for each in padded]).to(model.device, dtypes.get(name)),
                requires_grad=parse_name(name).part in parts,
            )
            for name in padded[0]
        }
        self.gates = {
            name: nn.Parameter(torch.ones_like(core[..., 0, 0]), requires_grad=core.requires_grad)
            for name, core in self.parameters.items()
            if parse_name(name).part == "core" and core.ndim == 4
        }

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [each for each in (*self.parameters.values(), *self.gates.values()) if each.requires_grad]

    def factors(self, client: int) -> dict[str, Factors]:
        """A client's live factors."""
        return dict(Adapter.from_tensors({name: each[client] for name, each in self.parameters.items()}).factors)

    def copied(self, client: int) -> dict[str, Tensor]:
        """A client's tensors as they are now, on their device."""
        copies = {name: each[client].detach().clone() for name, each in self.parameters.items()}
        for name, gates in self.gates.items():
            copies[name] *= gates[client].detach()[:, None, None]
        return copies

    def keep(self, clients: Sequence[int], optimizer: torch.optim.Optimizer) -> None:
        """Let go of all others, with what the optimiser remembers of them."""
        for parameter in (*self.parameters.values(), *self.gates.values()):
            state = optimizer.state.get(parameter, {})
            state |= {key: each[clients] for key, each in state.items() if each.shape == parameter.shape}
            parameter.grad, parameter.data = None, parameter.data[clients]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within, the model computes with these instead of its own adapter and head."""
        with ExitStack() as changes:
            changes.enter_context(self._model.cores_as(self._through_core))
            for module, names in _owners(self._model).items():
                ours = {attribute: self.parameters[name] for attribute, name in names.items()}
                changes.enter_context(instead(module, _forms()[type(module)](module, ours)))
            yield

    def _through_core(self, module: str, output: Tensor) -> Tensor:
        """What A puts out, times each client's core."""
        name = f"{PEFT_PREFIX}{module}.lora_core"
        core: Tensor = self.parameters[name]
        if name in self.gates:
            gated = core * self.gates[name][..., None, None]
            core = torch.stack([torch.block_diag(*blocks) for blocks in gated])  # type: ignore[no-untyped-call]
        return times(output, core.to(output.dtype))


def as_adapter(tensors: Mapping[str, Tensor], like: Adapter) -> Adapter:
    """A client's copied tensors as its adapter, on the CPU, at the ranks that it had."""
    stored = {name: each.to("cpu", resident.STORED) for name, each in tensors.items()}
    return Adapter.from_tensors(stored).cut_like(like)


def times(x: Tensor, weight: Tensor) -> Tensor:
    """Rows of clients (clients · … × d_in) times the transposed weight of each (clients × d_out × d_in)."""
    found = torch.bmm(x.reshape(len(weight), -1, x.shape[-1]), weight.transpose(1, 2))
    return found.reshape(*x.shape[:-1], weight.shape[1])


def unknown_layer(model: ResidentModel) -> tuple[str, str] | None:
    """A layer with trained parameters that has no form for several clients, and what it is; None where all have."""
    names = {module: name for name, module in model.peft.get_base_model().named_modules()}
    for module, parts in _owners(model).items():
        if type(module) not in _forms() or len(parts) < sum(each is not None for each in module._parameters.values()):
            return names[module], type(module).__name__
    return None


def _owners(model: ResidentModel) -> dict[nn.Module, dict[str, str]]:
    """The layers with trained parameters, and the names of these by attribute. An embedding has its factors as `A` and
    `B`, and so has DoRA's magnitude, which depends on them."""
    places = model.places()
    owners: dict[nn.Module, dict[str, str]] = {}
    factors = {(parsed.module, parsed.part): name for name in places if (parsed := parse_name(name)).part in ("A", "B")}
    for name, (owner, attribute) in places.items():
        parsed = parse_name(name)
        if parsed.kind == "linear":
            owners.setdefault(owner, {})[attribute] = name
        else:
            owners.setdefault(model.peft.get_base_model().get_submodule(parsed.module), {})[parsed.part] = name
        if parsed.part == "magnitude":
            owners[owner] |= {"A": factors[parsed.module, "A"], "B": factors[parsed.module, "B"]}
    return owners


@cache
def _forms() -> dict[type[nn.Module], Callable[[Any, Parameters], Forward]]:
    """How layers compute with the parameters of several clients."""
    lora = peftlibrary.load().tuners.lora
    return {
        nn.Linear: _linear,
        nn.LayerNorm: _layer_norm,
        lora.layer.Embedding: _embedding,
        lora.dora.DoraLinearLayer: _magnitude,
    }


def _linear(layer: nn.Linear, of: Parameters) -> Forward:
    def forward(x: Tensor) -> Tensor:
        found = times(x, of["weight"])
        return found if "bias" not in of else _with_each(torch.add, found, of["bias"])

    return forward


def _layer_norm(layer: nn.LayerNorm, of: Parameters) -> Forward:
    def forward(x: Tensor) -> Tensor:
        plain = nn.functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
        scaled = _with_each(torch.mul, plain, of["weight"]) if "weight" in of else plain
        return _with_each(torch.add, scaled, of["bias"]) if "bias" in of else scaled

    return forward


def _embedding(layer: Any, of: Parameters) -> Forward:
    """PEFT's embedding: what each client's A has for a token, times its B; padding has no gradient."""
    base = layer.get_base_layer()

    def forward(x: Tensor) -> Tensor:
        result = layer.base_layer(x)
        A, B = of["A"], of["B"]
        ids = x.reshape(len(A), -1)
        rows = A.transpose(1, 2).gather(1, ids[..., None].expand(-1, -1, A.shape[1]))
        if base.padding_idx is not None:
            rows = torch.where((ids == base.padding_idx)[..., None], rows.detach(), rows)
        added = torch.bmm(rows, B.transpose(1, 2)).reshape(*x.shape, -1) * layer.scaling["default"]
        scale = layer._get_embed_scale()
        if scale is not None:
            added = added * scale.to(added.dtype)
        found: Tensor = (result + added).to(result.dtype)
        return found

    return forward


def _magnitude(layer: Any, of: Parameters) -> Forward:
    """PEFT's DoRA of a linear layer. ‖W + s·B·A‖² of a row is ‖W‖² + 2s·(W·Aᵀ)∘B + s²·B·(A·Aᵀ)∘B, summed over the row:
    no client has a weight of its own in memory."""

    def forward(
        x: Tensor, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any, base_result: Tensor | None, **_: Any
    ) -> Tensor:
        weight = plain_weight(base_layer).to(x.dtype)
        weight = weight.T if layer.fan_in_fan_out else weight
        with torch.autocast(x.device.type, enabled=False):
            norms = _row_norms(weight, of["A"].detach(), scaling * of["B"].detach())
        scale = of["weight"] / norms
        if base_result is None:
            base_result = nn.functional.linear(x, weight)
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias
        learned = lora_B(lora_A(x)) * scaling
        return _with_each(torch.mul, base_result, scale - 1) + _with_each(torch.mul, learned, scale)

    return forward


def _row_norms(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Norms of the rows of W + B·A of each client (clients × d_out)."""
    cross = (weight @ A.transpose(1, 2) * B).sum(2)
    own = (B @ (A @ A.transpose(1, 2)) * B).sum(2)
    return (weight.square().sum(1) + 2 * cross + own).clamp_min(0).sqrt()


def _with_each(operation: Callable[[Tensor, Tensor], Tensor], x: Tensor, values: Tensor) -> Tensor:
    """Rows of clients (clients · … × d) with a vector of each (clients × d)."""
    return operation(x.reshape(len(values), -1, values.shape[-1]), values[:, None]).reshape(x.shape)
