"""Scores of a model on labelled examples, as values that add up over parts of a test set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedlora.data.batches import evaluation_batches

if TYPE_CHECKING:
    from fedlora.data.tokens import Examples, Padding
    from fedlora.model.resident import ResidentModel


@dataclass(frozen=True)
class Scores:
    """Counts `confusion[true, predicted]` (labels × labels) and the summed cross-entropy in nats."""

    confusion: np.ndarray
    loss_sum: float

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.confusion + other.confusion, self.loss_sum + other.loss_sum)

    @property
    def examples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / self.examples)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self.loss_sum / self.examples

    @property
    def macro_f1(self) -> float:
        """F1 averaged over the labels that occur, as truth or as prediction (scikit-learn's convention)."""
        hits = np.diag(self.confusion)
        sizes = self.confusion.sum(0) + self.confusion.sum(1)
        occurs = sizes > 0
        return float(np.mean(2 * hits[occurs] / sizes[occurs]))

    def to_json(self) -> dict[str, Any]:
        return {"confusion": self.confusion.tolist(), "loss_sum": self.loss_sum}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Scores:
        """Raises:
        KeyError, TypeError, ValueError: these are no scores.
        """
        counts, loss_sum = np.asarray(content["confusion"]), content["loss_sum"]
        square = counts.dtype == np.int64 and counts.ndim == 2 and counts.shape[0] == counts.shape[1]
        if not square or counts.min(initial=0) < 0 or type(loss_sum) is not float:
            raise ValueError("scores are a square of counts, and a loss")
        return cls(counts, loss_sum)


def evaluate(
    model: ResidentModel,
    examples: Examples,
    labels: int,
    batch_size: int,
    padding: Padding,
) -> Scores:
    """Score the model with the adapter that is loaded in it; every example once, batched by length, no gradients."""
    confusion = np.zeros((labels, labels), dtype=np.int64)
    loss_sum = torch.zeros((), dtype=torch.float64)
    model.peft.eval()
    with torch.inference_mode(), model.autocast():
        for batch in evaluation_batches(examples, batch_size, padding):
            on_device = batch.to(model.device)
            logits = model.peft(**on_device.model_inputs()).logits.float()
            loss_sum += nn.functional.cross_entropy(logits, on_device.labels, reduction="sum").double().cpu()
            np.add.at(confusion, (batch.labels.numpy(), logits.argmax(-1).cpu().numpy()), 1)
    return Scores(confusion, float(loss_sum))
