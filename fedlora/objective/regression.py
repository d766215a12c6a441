"""Regression: a number for a text or a pair of texts, by a head of one output; scored by Pearson's correlation.

It decides because it is what squared error is after, whatever unit the numbers have: the error itself has their unit
squared, and Spearman's looks at the order alone, in which a small change is none or a jump.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fedlora.config import DataConfig, ModelConfig, RunConfig
from fedlora.data import numbers, tokens
from fedlora.data.batches import Batch, evaluation_batches
from fedlora.data.sources import Draft, LabelledText
from fedlora.data.tokens import Examples, Padding
from fedlora.errors import ConfigError, DataError, counted
from fedlora.model.base import load_base, pooling_of
from fedlora.model.known import KNOWN
from fedlora.objective import classification
from fedlora.objective.base import Loss, Objective, Resident, Score, Scores, check_groups

if TYPE_CHECKING:
    import pyarrow as pa

_OUTPUT = ["LABEL_0"]
"""The head's only output, as Transformers calls it: a checkpoint with such a head keeps it."""
_FEWEST = 3
"""Examples of which there is a correlation: of two it is one or minus one."""


@dataclass(frozen=True, eq=False)
class Pairs(Scores):
    """Predicted and true numbers (each: examples, float32)."""

    predicted: npt.NDArray[np.float32]
    true: npt.NDArray[np.float32]

    def __add__(self, other: Pairs) -> Pairs:
        joined = (np.concatenate(both) for both in ((self.predicted, other.predicted), (self.true, other.true)))
        return Pairs(*joined)

    @property
    def examples(self) -> int:
        return len(self.true)

    @cached_property
    def _ordered(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Predicted and true in an order that is theirs: sums do not depend on that in which parts came."""
        order = np.lexsort((self.predicted, self.true))
        return self.predicted[order].astype(np.float64), self.true[order].astype(np.float64)

    @property
    def loss(self) -> float:
        """Mean squared error, in the square of the numbers' unit."""
        predicted, true = self._ordered
        return float(np.mean((predicted - true) ** 2))

    def values(self) -> dict[str, float]:
        """Correlations only where there is something to go with: three examples that are not all the same. A model that
        says the same of all has none, which is 0."""
        from scipy import stats  # type: ignore[import-untyped]

        predicted, true = self._ordered
        found = {"loss": self.loss, "rmse": math.sqrt(self.loss)}
        if len(true) < _FEWEST or np.ptp(true) == 0:
            return found
        if np.ptp(predicted) == 0:
            return {"pearson": 0.0, "spearman": 0.0, **found}
        correlations = (stats.pearsonr(predicted, true), stats.spearmanr(predicted, true))
        pearson, spearman = (float(np.clip(each.statistic, -1, 1)) for each in correlations)
        return {"pearson": pearson, "spearman": spearman, **found}

    def to_json(self) -> dict[str, Any]:
        """Single precision as it is, in base 64: eleven characters an example, and no digit lost."""
        return {
            name: base64.b64encode(values.astype("<f4").tobytes()).decode()
            for name, values in (("predicted", self.predicted), ("true", self.true))
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Pairs:
        predicted, true = (
            np.frombuffer(base64.b64decode(content[name], validate=True), "<f4").astype(np.float32)
            for name in ("predicted", "true")
        )
        if len(predicted) != len(true) or not (np.isfinite(predicted).all() and np.isfinite(true).all()):
            raise ValueError("scores are finite numbers in pairs")
        return cls(predicted, true)


PEARSON = Score("pearson", higher_is_better=True, low=-1.0, high=1.0, title="Pearson r", unit="no unit")
SPEARMAN = Score("spearman", higher_is_better=True, low=-1.0, high=1.0, title="Spearman r", unit="no unit")
LOSS = Score(
    "loss", higher_is_better=False, low=0.0, high=math.inf, title="squared error", unit="squared unit of the numbers"
)


class Regression(Objective):
    """A number for a text: squared error of a head's one output, a unit an example. The network is a classifier's."""

    name: ClassVar[str] = "regression"
    scores: ClassVar[type[Scores]] = Pairs
    labelled: ClassVar[bool] = False
    beside: ClassVar[Sequence[Score]] = (SPEARMAN, LOSS)

    def score_of(self, config: RunConfig) -> Score:
        return PEARSON

    def check(self, config: RunConfig) -> None:
        check_groups(config)
        for key in classification.OF_DIALOGUES:
            if (value := getattr(config.data, key)) is not None:
                raise ConfigError(f"data.{key}={value} is for dialogues; leave it out, or set task=generation")

    def check_examples(self, config: RunConfig, test: pa.Table, train: pa.Table) -> None:
        if len(test) < _FEWEST or len(test["value"].unique()) < 2:
            raise DataError(
                f"{counted(len(test), 'test example')} with {counted(len(test['value'].unique()), 'different number')} "
                f"tell no correlation; expected at least {_FEWEST} that are not all the same: raise data.test_size or "
                "data.test_fraction"
            )

    def draft(self, data: DataConfig, by: str | None, seed: int, light: bool = False) -> Draft:
        return numbers.read(data, by, seed)

    def tokenise(self, text: LabelledText, tokenizer: Any, data: DataConfig, cache: Path) -> Path:
        return tokens.tokenise(text, tokenizer, data.max_length, cache)

    def bare(self, config: ModelConfig, declared: Any) -> nn.Module:
        return classification.OBJECTIVE.bare(config, declared)

    def load(self, config: ModelConfig, labels: Sequence[str], pad_token_id: int | None, seed: int) -> nn.Module:
        return load_base(config, _OUTPUT, pad_token_id, seed)

    def with_peft_alone(self, config: ModelConfig, labels: int, changed: bool) -> tuple[str, str]:
        auto = ""
        if not changed and config.name not in KNOWN and pooling_of(config) == "head":
            auto = (
                '\n\nOr `peft.AutoPeftModelForSequenceClassification.from_pretrained("this folder", num_labels=1, '
                "dtype='float32')`,\nwhich finds the base by its name and must be told that the head has one output."
            )
        made = f'`fedlora.load_base("{config.name}", labels={_OUTPUT})`\n(pooling and head as in training).'
        return made, auto

    def task_type(self, network: nn.Module) -> str | None:
        return classification.OBJECTIVE.task_type(network)

    def loss(self, model: Resident, batch: Batch) -> Loss:
        with model.autocast():
            predicted = _predicted(model, batch)
        return Loss(nn.functional.mse_loss(predicted.float(), batch.labels), len(batch))

    def by_row(self, model: Resident, batch: Batch) -> Tensor:
        with model.autocast():
            predicted = _predicted(model, batch)
        return nn.functional.mse_loss(predicted.float(), batch.labels, reduction="none")

    def evaluate(self, model: Resident, examples: Examples, batch_size: int, padding: Padding) -> Pairs:
        found: list[Tensor] = [torch.zeros(0)]
        true = [torch.zeros(0)]
        model.peft.eval()
        with torch.inference_mode(), model.autocast():
            for batch in evaluation_batches(examples, batch_size, padding):
                found.append(_predicted(model, batch.to(model.device)).float().cpu())
                true.append(batch.labels)
        return Pairs(torch.cat(found).numpy(), torch.cat(true).numpy())


def _predicted(model: Resident, batch: Batch) -> Tensor:
    """A number for each text of a batch."""
    logits: Tensor = model.peft(**batch.model_inputs()).logits
    return logits[:, 0]


OBJECTIVE = Regression()
