"""Classification: one label for a text, by a head on the model; scored by accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.config import DataConfig, ModelConfig, RunConfig
from fedlora.data import sources, tokens
from fedlora.data.batches import Batch, evaluation_batches
from fedlora.data.sources import Draft, LabelledText
from fedlora.data.tokens import Examples, Padding
from fedlora.errors import ConfigError
from fedlora.model.base import load_base, pooling_of
from fedlora.model.heads import PooledClassifier
from fedlora.model.known import KNOWN
from fedlora.objective.base import Loss, Objective, Resident, Score, Scores

OF_DIALOGUES = ("prompt", "response", "template", "messages", "tests", "options")
"""Keys of `data` that say where dialogues are."""


@dataclass(frozen=True)
class Confusion(Scores):
    """Counts `confusion[true, predicted]` (labels × labels) and the summed cross-entropy in nats."""

    confusion: np.ndarray
    loss_sum: float

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.confusion + other.confusion, self.loss_sum + other.loss_sum)

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

    def values(self) -> dict[str, float]:
        return {"accuracy": self.accuracy, "loss": self.loss, "macro_f1": self.macro_f1}

    def to_json(self) -> dict[str, Any]:
        return {"confusion": self.confusion.tolist(), "loss_sum": self.loss_sum}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Confusion:
        """Raises:
        KeyError, TypeError, ValueError: these are no scores.
        """
        counts, loss_sum = np.asarray(content["confusion"]), content["loss_sum"]
        square = counts.dtype == np.int64 and counts.ndim == 2 and counts.shape[0] == counts.shape[1]
        if not square or counts.min(initial=0) < 0 or type(loss_sum) is not float:
            raise ValueError("scores are a square of counts, and a loss")
        return cls(counts, loss_sum)


ACCURACY = Score("accuracy", higher_is_better=True, low=0.0, high=1.0, title="accuracy", unit="share", proportion=True)
MACRO_F1 = Score("macro_f1", higher_is_better=True, low=0.0, high=1.0, title="macro-F1", unit="share")


class Classification(Objective):
    """A label for a text: cross-entropy of a head's logits, a unit an example."""

    name: ClassVar[str] = "classification"
    scores: ClassVar[type[Scores]] = Confusion
    labelled: ClassVar[bool] = True
    beside: ClassVar[Sequence[Score]] = (MACRO_F1,)

    def score_of(self, config: RunConfig) -> Score:
        return ACCURACY

    def check(self, config: RunConfig) -> None:
        others = {f"data.{key}": getattr(config.data, key) for key in OF_DIALOGUES}
        for key, value in (others | {"partition.by": config.partition.by}).items():
            if value is not None:
                raise ConfigError(f"{key}={value} is for tasks without labels; leave it out, or set task=generation")

        if config.weighting == "tokens":
            raise ConfigError("weighting=tokens is for task=generation; set weighting to examples or uniform")
        if config.training.packing:
            raise ConfigError("training.packing=true is for task=generation; leave it out")

    def draft(self, data: DataConfig, by: str | None, seed: int, light: bool = False) -> Draft:
        return sources.read(data, seed, light)

    def tokenise(self, text: LabelledText, tokenizer: Any, data: DataConfig, cache: Path) -> Path:
        return tokens.tokenise(text, tokenizer, data.max_length, cache)

    def bare(self, config: ModelConfig, declared: Any) -> nn.Module:
        from transformers import AutoModel, AutoModelForSequenceClassification

        pooling = pooling_of(config)
        if pooling == "head":
            network: nn.Module = AutoModelForSequenceClassification.from_config(declared)
            return network
        return PooledClassifier(AutoModel.from_config(declared), 2, pooling)

    def load(self, config: ModelConfig, labels: Sequence[str], pad_token_id: int | None, seed: int) -> nn.Module:
        return load_base(config, labels, pad_token_id, seed)

    def with_peft_alone(self, config: ModelConfig, labels: int, changed: bool) -> tuple[str, str]:
        auto = ""
        if not changed and config.name not in KNOWN and pooling_of(config) == "head":
            auto = (
                '\n\nOr `peft.AutoPeftModelForSequenceClassification.from_pretrained("this folder", '
                f"num_labels={labels}, dtype='float32')`, which finds\nthe base by its name and must be told the "
                "number of classes."
            )
        made = f'`fedlora.load_base("{config.name}", labels={labels})`\n(pooling and classifier as in training).'
        return made, auto

    def task_type(self, network: nn.Module) -> str | None:
        return None if isinstance(network, PooledClassifier) else "SEQ_CLS"

    def loss(self, model: Resident, batch: Batch) -> Loss:
        with model.autocast():
            logits = model.peft(**batch.model_inputs()).logits
        return Loss(nn.functional.cross_entropy(logits.float(), batch.labels), len(batch))

    def by_row(self, model: Resident, batch: Batch) -> Tensor:
        with model.autocast():
            logits = model.peft(**batch.model_inputs()).logits
        return nn.functional.cross_entropy(logits.float(), batch.labels, reduction="none")

    def evaluate(self, model: Resident, examples: Examples, batch_size: int, padding: Padding) -> Confusion:
        labels = len(model.labels)
        confusion = np.zeros((labels, labels), dtype=np.int64)
        loss_sum = torch.zeros((), dtype=torch.float64)
        model.peft.eval()
        with torch.inference_mode(), model.autocast():
            for batch in evaluation_batches(examples, batch_size, padding):
                on_device = batch.to(model.device)
                logits = model.peft(**on_device.model_inputs()).logits.float()
                loss_sum += nn.functional.cross_entropy(logits, on_device.labels, reduction="sum").double().cpu()
                np.add.at(confusion, (batch.labels.numpy(), logits.argmax(-1).cpu().numpy()), 1)
        return Confusion(confusion, float(loss_sum))


OBJECTIVE = Classification()
