"""What one client does in one round: fresh optimiser, a few steps on its own data, its adapter back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedlora import seeds
from fedlora.adapter import Adapter, Factors, Part
from fedlora.config import TrainingConfig
from fedlora.data.batches import Batch, pad, parts_of, steps_for, training_rows
from fedlora.data.packing import pack
from fedlora.errors import AdapterError, ClientFailed
from fedlora.model.resident import ResidentModel
from fedlora.seeds import Turn

if TYPE_CHECKING:
    from fedlora.data.tokens import Examples, Padding


Penalty = Callable[[Mapping[str, Factors], Adapter], Tensor | None]
"""A strategy's term of the loss, of the live factors and the adapter they started from (`Strategy.penalty`)."""


@dataclass(frozen=True)
class Trained:
    """A client's result: its adapter, the loss of every step, and the wall time of the steps in seconds."""

    adapter: Adapter
    losses: list[float]
    seconds: float


def train(
    model: ResidentModel,
    start: Adapter,
    examples: Examples,
    training: TrainingConfig,
    turn: Turn,
    parts: frozenset[Part],
    padding: Padding,
    penalty: Penalty | None = None,
) -> Trained:
    """Train `parts` of the adapter `start` on a client's examples; the result has the ranks of `start`.

    Optimiser and schedule are made afresh; batches and dropout are drawn by (seed, round, client) alone. `penalty` is a
    strategy's own term of the loss; the losses that are reported are without it.

    Raises:
        ClientFailed: the loss, or what came of the last step, is not finite; names the client, round and step.
    """
    model.load(start)
    parameters, live = model.trainable(parts), model.factors()
    optimizer = _optimizer(parameters, training)
    warmup = max(training.warmup_steps, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    scaler = torch.amp.GradScaler(model.device.type, _LOSS_SCALE, enabled=model.dtype == "fp16")
    steps = steps_for(len(examples.labels), training.step_size, training.local_steps, training.local_epochs)
    order = seeds.torch_generator(turn.seed, "batches", turn.round, turn.client)
    seeds.seed_torch(turn.seed, "dropout", turn.round, turn.client, model.device)
    model.peft.train()
    form = pack if training.packing else pad
    losses: list[Tensor] = []
    begun = time.perf_counter()
    for rows in training_rows(examples, training.step_size, steps, order):
        batches = [form(examples, part, padding) for part in parts_of(rows, training.batch_size)]
        optimizer.zero_grad(set_to_none=True)
        loss = _backward(model, batches, scaler, lambda: penalty(live, start) if penalty else None)
        scaler.unscale_(optimizer)
        if training.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        losses.append(loss)
    curve = torch.stack(losses).tolist()
    trained = model.read().cut_like(start)
    return Trained(_finite(trained, curve, turn, start), curve, time.perf_counter() - begun)


def _backward(
    model: ResidentModel, batches: Sequence[Batch], scaler: torch.amp.GradScaler, penalty: Callable[[], Tensor | None]
) -> Tensor:
    """Gradients of the mean loss over all units of a step, batch by batch, and of the penalty; returns that mean."""
    units = [model.objective.units(batch) for batch in batches]
    found = []
    for number, batch in enumerate(batches):
        loss = model.objective.loss(model, batch.to(model.device)).mean * (units[number] / sum(units))
        extra = None if number else penalty()
        scaler.scale(loss if extra is None else loss + extra).backward()  # type: ignore[no-untyped-call]
        found.append(loss.detach())
    return torch.stack(found).sum()


_LOSS_SCALE = 2.0**12
"""Of fp16, at first: the usual 2¹⁶ overflows now and then, and each time a step of the few of a round is lost."""


def _optimizer(parameters: list[nn.Parameter], training: TrainingConfig) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
        )
    return torch.optim.AdamW(parameters, training.learning_rate, weight_decay=training.weight_decay)


def _finite(adapter: Adapter, losses: list[float], turn: Turn, start: Adapter) -> Adapter:
    for step, loss in enumerate(losses, start=1):
        if not torch.isfinite(torch.tensor(loss)):
            raise ClientFailed(
                f"{turn}: the loss is {loss} at step {step}, so training diverged; lower training.learning_rate"
            )
    try:
        adapter.check_like(start, str(turn))
    except AdapterError as error:
        raise ClientFailed(f"{error}; lower training.learning_rate") from None
    return adapter
