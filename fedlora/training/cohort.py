"""Several clients trained together: one pass of the frozen base over all their batches, each client's adapter and head
batched beside the others', one step of one optimiser.

Each comes to what it comes to alone (`fedlora.training.client`): its own batches, losses, clipping and draws, its own
number of steps. Only the order of sums differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedlora import seeds
from fedlora.adapter import Adapter, Part
from fedlora.config import TrainingConfig
from fedlora.data.batches import Batch, on_device, steps_for
from fedlora.data.joined import join
from fedlora.errors import ClientFailed
from fedlora.model.resident import ResidentModel
from fedlora.seeds import Turn
from fedlora.training import client
from fedlora.training.batched import Stack, as_adapter
from fedlora.training.client import Penalty, Trained
from fedlora.training.draws import OwnDraws

if TYPE_CHECKING:
    from fedlora.data.tokens import Examples, Padding


@dataclass(frozen=True)
class Member:
    """A client of a cohort: what it starts from, what it trains on, and whose draws are its own."""

    start: Adapter
    examples: Examples
    turn: Turn


def train(
    model: ResidentModel,
    members: Sequence[Member],
    training: TrainingConfig,
    parts: frozenset[Part],
    padding: Padding,
    penalty: Penalty | None = None,
) -> list[Trained | ClientFailed]:
    """What each client comes to; of one that diverged, why it has come to nothing, which the others do not notice.

    Arguments are those of `client.train`, and so are results, but for the seconds: each has its part of the cohort's.

    Raises:
        CannotShare: the model draws dropout in a manner that is not understood.
        DataError: a client has no examples.
    """
    model.load(members[0].start)
    model.trainable(frozenset())
    model.objective.get_ready(model)
    model.peft.train()
    cohort = _Cohort(model, members, training, parts, padding, penalty)
    begun = time.perf_counter()
    with cohort.stack.attached(), cohort.draws or nullcontext():
        ended = cohort.play()
    found = [(as_adapter(tensors, each.start), curve) for each, (tensors, curve) in zip(members, ended, strict=True)]
    seconds = (time.perf_counter() - begun) / len(members)
    return [_result(each, adapter, curve, seconds) for each, (adapter, curve) in zip(members, found, strict=True)]


def _result(member: Member, adapter: Adapter, curve: list[float], seconds: float) -> Trained | ClientFailed:
    try:
        return Trained(client.finite(adapter, curve, member.turn, member.start), curve, seconds)
    except ClientFailed as failed:
        return failed


class _Cohort:
    """Clients at work, and those who have ended: a client leaves after its last step, so that nothing is computed for
    it any more."""

    def __init__(
        self,
        model: ResidentModel,
        members: Sequence[Member],
        training: TrainingConfig,
        parts: frozenset[Part],
        padding: Padding,
        penalty: Penalty | None,
    ) -> None:
        self._model, self._members, self._training = model, members, training
        self._padding, self._penalty = padding, penalty
        self.stack = Stack(model, [each.start for each in members], parts)
        self._optimizer, self._schedule = client.optimizer_of(self.stack.trained, training)
        self._streams = [client.steps_of(each.examples, training, each.turn, padding) for each in members]
        self._steps = [
            steps_for(len(each.examples), training.step_size, training.local_steps, training.local_epochs)
            for each in members
        ]
        self._at_work = list(range(len(members)))
        self.draws = OwnDraws([_generator(each.turn) for each in members]) if model.device.type == "cpu" else None
        if self.draws is None:
            first = members[0].turn
            seeds.seed_torch(first.seed, client.DROPOUT, first.round, first.client, model.device)

    def play(self) -> list[tuple[dict[str, Tensor], list[float]]]:
        """Take all steps; the tensors of each client after its last one, and its losses."""
        losses, whose = [], []
        ended: dict[int, dict[str, Tensor]] = {}
        for step in range(1, max(self._steps) + 1):
            losses.append(self._step())
            whose += self._at_work
            staying = [place for place, who in enumerate(self._at_work) if self._steps[who] > step]
            if len(staying) < len(self._at_work):
                leaving = enumerate(self._at_work)
                ended |= {who: self.stack.copied(place) for place, who in leaving if self._steps[who] == step}
                self._keep(staying)
        curves: list[list[float]] = [[] for _ in self._members]
        for who, loss in zip(whose, torch.cat(losses).tolist(), strict=True):
            curves[who].append(loss)
        return [(ended[who], curve) for who, curve in enumerate(curves)]

    def _keep(self, staying: Sequence[int]) -> None:
        self._at_work = [self._at_work[place] for place in staying]
        self.stack.keep(staying, self._optimizer)
        if self.draws is not None:
            self.draws.generators = [self.draws.generators[place] for place in staying]

    def _step(self) -> Tensor:
        """One step of all who are at work; the mean loss of each."""
        batches = [next(self._streams[who]) for who in self._at_work]
        units = [sum(map(self._model.objective.units, own)) for own in batches]
        self._optimizer.zero_grad(set_to_none=True)
        found = []
        for number, some in enumerate(zip_longest(*batches)):
            means = self._means(some, units)
            loss = means.sum()
            for extra in () if number else self._penalties():
                loss = loss + extra
            loss.backward()  # type: ignore[no-untyped-call]
            found.append(means.detach())
        if self._training.max_grad_norm is not None:
            clip(self.stack.trained, self._training.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        return torch.stack(found).sum(0)

    def _means(self, batches: Sequence[Batch | None], units: Sequence[int]) -> Tensor:
        """What a batch of each client adds to the mean loss of its step."""
        model, joined = self._model, join(batches, self._padding)
        if self.draws is not None:
            self.draws.joined = joined
        by_row = model.objective.by_row(model, joined.batch.to(model.device))
        shares = on_device(joined.shares(units).to(by_row.dtype), model.device)
        return (by_row.reshape(shares.shape) * shares).sum(1)

    def _penalties(self) -> Iterator[Tensor]:
        """A strategy's term of each client's loss."""
        for place, who in enumerate(self._at_work if self._penalty else ()):
            extra = self._penalty(self.stack.factors(place), self._members[who].start)  # type: ignore[misc]
            if extra is not None:
                yield extra


def clip(parameters: Sequence[nn.Parameter], most: float) -> None:
    """Scale each client's gradients (clients × … of each parameter) down to a norm, as `clip_grad_norm_` does those of
    one."""
    gradients = [each.grad for each in parameters if each.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (most / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.reshape(-1, *(1,) * (gradient.ndim - 1)))


def _generator(turn: Turn) -> torch.Generator:
    return seeds.torch_generator(turn.seed, client.DROPOUT, turn.round, turn.client)
