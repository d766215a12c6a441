"""What a causal language model predicts at some positions, without the logits of all others.

A vocabulary of 100,000 makes logits the largest tensor of a step. So the network's body is run once, and what follows
it (the output layer with its adapter, scales and caps, as the architecture has them) on the wanted positions alone, a
few at a time; their gradients are taken at once, so that no logits are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_NUMBERS = 2**24
"""Logits that are held at a time: 64 MB in fp32, and about three times that with their gradients."""

Logits = Callable[[Tensor], Tensor]
"""From hidden states (positions × width) to logits (positions × vocabulary)."""


def cross_entropy(network: Any, inputs: dict[str, Tensor], places: Tensor, targets: Tensor) -> Tensor:
    """Mean of −log p(target), with gradients.

    Args:
        network: that writes, without PEFT around it; adapters in its layers count.
        inputs: of its forward pass.
        places: which positions predict (of batch × tokens, flat).
        targets: what they should, in the order of `places`.
    """
    hidden, logits = _split(network, inputs, places)
    parts = _parts(network, len(targets))
    if len(parts) == 1:
        return nn.functional.cross_entropy(logits(hidden).float(), targets)
    found = _in_parts(hidden, targets, logits, parts)
    return torch.stack([found[part].sum() for part in parts]).sum() / len(targets)


def each(network: Any, inputs: dict[str, Tensor], places: Tensor, targets: Tensor) -> Tensor:
    """−log p of each target (positions), with gradients; arguments as above."""
    hidden, logits = _split(network, inputs, places)
    return _in_parts(hidden, targets, logits, _parts(network, len(targets)))


def _in_parts(hidden: Tensor, targets: Tensor, logits: Logits, parts: list[slice]) -> Tensor:
    def found(some: Tensor, of_them: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(some).float(), of_them, reduction="none")

    if len(parts) == 1:
        return found(hidden, targets)
    if logits(hidden[:1].detach()).requires_grad:  # the output learns too: its parts are computed again
        return torch.cat([checkpoint(found, hidden[part], targets[part], use_reentrant=False) for part in parts])
    losses: Tensor = _AtOnce.apply(hidden, targets, found, parts)  # type: ignore[no-untyped-call]
    return losses


class _AtOnce(torch.autograd.Function):
    """The loss of each position, whose gradient is computed together with it, part by part."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, found: Callable[[Tensor, Tensor], Tensor], parts: list[slice]
    ) -> Tensor:
        losses, gradients = [], torch.empty_like(hidden)
        for part in parts:
            with torch.enable_grad():
                some = hidden[part].detach().requires_grad_()
                each = found(some, targets[part])
                (gradients[part],) = torch.autograd.grad(each.sum(), some)
            losses.append(each.detach())
        ctx.save_for_backward(gradients)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradients,) = ctx.saved_tensors
        return gradients * outer[:, None].to(gradients.dtype), None, None, None


def measured(network: Any, inputs: dict[str, Tensor], places: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """The sum of −log p(target) in float64, and how many targets were the likeliest; arguments as above."""
    hidden, logits = _split(network, inputs, places)
    total, hits = torch.zeros((), dtype=torch.float64), 0
    for part in _parts(network, len(targets)):
        found = logits(hidden[part]).float()
        total += nn.functional.cross_entropy(found, targets[part], reduction="sum").double().cpu()
        hits += int((found.argmax(-1) == targets[part]).sum())
    return total, hits


def _parts(network: Any, positions: int) -> list[slice]:
    most = max(1, _NUMBERS // int(network.config.get_text_config().vocab_size))
    return [slice(start, start + most) for start in range(0, positions, most)] or [slice(0, 0)]


def _split(network: Any, inputs: dict[str, Tensor], places: Tensor) -> tuple[Tensor, Logits]:
    """What the body puts out where it is wanted, and how that becomes logits; of a network that has no such two
    halves, the logits themselves, and nothing."""
    if not has_halves(network):
        return network(**{**inputs, "use_cache": False}).logits.flatten(0, 1).index_select(
            0, places
        ), lambda logits: logits
    found = _body(network)(**{**inputs, "use_cache": False})
    return found.last_hidden_state.flatten(0, 1).index_select(0, places), lambda hidden: _after_body(
        network, type(found), hidden
    )


def _after_body(network: Any, kind: type, hidden: Tensor) -> Tensor:
    """The network's own forward pass with what its body has put out already."""
    ready = kind(last_hidden_state=hidden[None])
    with instead(_body(network), lambda *_, **__: ready):
        logits: Tensor = network(input_ids=torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)).logits
    return logits[0]


def _body(network: Any) -> nn.Module:
    body: nn.Module = network.base_model
    return body


@contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward pass for a module; one that was set on it already, by a library, comes back afterwards."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


_HALVES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Which networks were found to be a body and what follows it, position by position."""


def has_halves(network: Any) -> bool:
    """Whether both halves, one after the other, give what the whole does: tried once, on four tokens."""
    if network not in _HALVES:
        _HALVES[network] = _tried(network)
    return _HALVES[network]


def _tried(network: Any) -> bool:
    device = next(network.parameters()).device
    ids = torch.arange(4, device=device)[None] % int(network.config.get_text_config().vocab_size)
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            whole = network(input_ids=ids, use_cache=False).logits
            found = _body(network)(input_ids=ids, use_cache=False)
            halves = _after_body(network, type(found), found.last_hidden_state[0].flip(0)).flip(0)[None]
            return torch.allclose(whole, halves, rtol=1e-2, atol=1e-2 * float(whole.abs().max()))
    except Exception:  # whatever an architecture of another build raises
        return False
    finally:
        for module in training:
            module.training = True
