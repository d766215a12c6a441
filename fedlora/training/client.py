"""What one client does in one round: fresh optimiser, a few steps on its own data, its adapter back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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


DROPOUT = "dropout"
"""The purpose that what dropout draws is keyed by."""

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
    optimizer, schedule = optimizer_of(parameters, training)
    scaler = torch.amp.GradScaler(model.device.type, _LOSS_SCALE, enabled=model.dtype == "fp16")
    seeds.seed_torch(turn.seed, DROPOUT, turn.round, turn.client, model.device)
    model.peft.train()
    losses: list[Tensor] = []
    begun = time.perf_counter()
    for batches in steps_of(examples, training, turn, padding):
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
    return Trained(finite(trained, curve, turn, start), curve, time.perf_counter() - begun)


def steps_of(examples: Examples, training: TrainingConfig, turn: Turn, padding: Padding) -> Iterator[list[Batch]]:
    """The batches of each step of a client in a round, drawn by (seed, round, client).

    Raises:
        DataError: there are no examples.
    """
    steps = steps_for(len(examples), training.step_size, training.local_steps, training.local_epochs)
    order = seeds.torch_generator(turn.seed, "batches", turn.round, turn.client)
    form = pack if training.packing else pad
    for rows in training_rows(examples, training.step_size, steps, order):
        yield [form(examples, part, padding) for part in parts_of(rows, training.batch_size)]


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


def optimizer_of(
    parameters: Sequence[nn.Parameter], training: TrainingConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """A fresh optimiser of these parameters, and the schedule of its learning rate."""
    rate, decay = training.learning_rate, training.weight_decay
    optimizer: torch.optim.Optimizer
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, rate, momentum=training.momentum, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=decay)
    warmup = max(training.warmup_steps, 1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))


def finite(adapter: Adapter, losses: Sequence[float], turn: Turn, start: Adapter) -> Adapter:
    """The adapter that a client trained from `start`.

    Raises:
        ClientFailed: it, or a loss, is not finite.
    """
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
