"""Generation: the next token of a dialogue, by a causal language model; scored by its loss on held-out responses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedlora.config import DataConfig, ModelConfig, RunConfig
from fedlora.data import dialogues, tokens
from fedlora.data.batches import Batch, evaluation_batches
from fedlora.data.sources import Draft, LabelledText
from fedlora.data.tokens import Examples, Padding
from fedlora.data.turns import IGNORED, Turns
from fedlora.errors import ConfigError
from fedlora.model.base import check_writer, load_writer
from fedlora.objective.base import Loss, Objective, Resident, Score, Scores

_WITHOUT_LABELS = ("iid", "quantity", "natural-id")
"""Partitioners that look at no label."""


@dataclass(frozen=True)
class TokenScores(Scores):
    """Summed cross-entropy in nats of the tokens that are to be predicted, how many they are, how many were the
    likeliest, and of how many examples."""

    loss_sum: float
    tokens: int
    hits: int
    count: int

    def __add__(self, other: TokenScores) -> TokenScores:
        return TokenScores(
            self.loss_sum + other.loss_sum, self.tokens + other.tokens, self.hits + other.hits, self.count + other.count
        )

    @property
    def examples(self) -> int:
        return self.count

    @property
    def loss(self) -> float:
        """Mean cross-entropy per token, in nats."""
        return self.loss_sum / self.tokens

    def values(self) -> dict[str, float]:
        perplexity = math.exp(min(self.loss, 700.0))  # beyond, a float is infinite
        return {"loss": self.loss, "perplexity": perplexity, "token_accuracy": self.hits / self.tokens}

    def to_json(self) -> dict[str, Any]:
        return {"loss_sum": self.loss_sum, "tokens": self.tokens, "hits": self.hits, "count": self.count}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TokenScores:
        counts = [content[name] for name in ("tokens", "hits", "count")]
        loss_sum = content["loss_sum"]
        if any(type(each) is not int or each < 0 for each in counts) or type(loss_sum) is not float:
            raise ValueError("scores are counts, and a loss")
        if not counts[1] <= counts[0] or not counts[2] <= counts[0]:
            raise ValueError("scores are of fewer tokens than they count")
        return cls(loss_sum, *counts)


class Generation(Objective):
    """What an assistant says: cross-entropy of the next token, a unit a token that is trained."""

    name: ClassVar[str] = "generation"
    score: ClassVar[Score] = Score("loss", higher_is_better=False, low=0.0, high=math.inf)
    scores: ClassVar[type[Scores]] = TokenScores
    labelled: ClassVar[bool] = False
    titles: ClassVar[Mapping[str, str]] = {"loss": "loss", "token_accuracy": "token accuracy"}

    def check(self, config: RunConfig) -> None:
        if config.partition.name not in _WITHOUT_LABELS and config.partition.by is None:
            raise ConfigError(
                f"partition.name={config.partition.name} deals examples by label, and task=generation has none; set "
                f"partition.by to a column whose values may stand for it, or partition.name to one of "
                f"{', '.join(_WITHOUT_LABELS)}"
            )
        _check_columns(config.data)
        if config.model.pooling != "auto":
            raise ConfigError(f"model.pooling={config.model.pooling} is for task=classification; leave it out")

    def draft(self, data: DataConfig, by: str | None, seed: int, light: bool = False) -> Draft:
        return dialogues.read(data, by, seed)

    def tokenise(self, text: LabelledText, tokenizer: Any, data: DataConfig, cache: Path) -> Path:
        tokenizer.padding_side = "right"  # so that a token stands where it would stand alone, in training and scoring
        turns = Turns(tokenizer, data.max_length, data.loss_on, data.too_long)
        return tokens.tokenise(text, tokenizer, data.max_length, cache, turns)

    def bare(self, config: ModelConfig, declared: Any) -> nn.Module:
        from transformers import AutoModelForCausalLM

        check_writer(config, declared)
        network: nn.Module = AutoModelForCausalLM.from_config(declared)
        return network

    def load(self, config: ModelConfig, labels: Sequence[str], pad_token_id: int | None, seed: int) -> nn.Module:
        network: Any = load_writer(config)
        if pad_token_id is not None:
            network.config.pad_token_id = pad_token_id
        return network  # type: ignore[no-any-return]

    def with_peft_alone(self, config: ModelConfig, labels: int, changed: bool) -> tuple[str, str]:
        return f'`transformers.AutoModelForCausalLM.from_pretrained("{config.name}")`.', ""

    def task_type(self, network: nn.Module) -> str | None:
        return "CAUSAL_LM"

    def loss(self, model: Resident, batch: Batch) -> Loss:
        with model.autocast():
            logits, targets = _predicted(model, batch)
        return Loss(nn.functional.cross_entropy(logits.float(), targets), len(targets))

    def evaluate(self, model: Resident, examples: Examples, batch_size: int, padding: Padding) -> TokenScores:
        loss_sum, found, hits = torch.zeros((), dtype=torch.float64), 0, 0
        model.peft.eval()
        with torch.inference_mode(), model.autocast():
            for batch in evaluation_batches(examples, batch_size, padding):
                logits, targets = _predicted(model, batch.to(model.device))
                logits = logits.float()
                loss_sum += nn.functional.cross_entropy(logits, targets, reduction="sum").double().cpu()
                hits += int((logits.argmax(-1) == targets).sum())
                found += len(targets)
        return TokenScores(float(loss_sum), found, hits, len(examples))


def _check_columns(data: DataConfig) -> None:
    """Refuse columns that say the same in two ways, or half of it."""
    asked = [key for key in ("prompt", "template", "messages") if getattr(data, key) is not None]
    if len(asked) > 1:
        raise ConfigError(f"data.{asked[0]} and data.{asked[1]} both say what is asked; leave one of them out")
    if asked == ["messages"] and data.response:
        raise ConfigError("data.messages holds the responses too; leave data.response out, or set data.prompt instead")
    if asked == ["prompt"] and data.response is None:
        raise ConfigError("data.prompt is given without data.response; expected both, or none")
    if data.response and not asked:
        raise ConfigError("data.response is given without data.prompt (or data.template); expected both, or none")


def _predicted(model: Resident, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (tokens × vocabulary) where a token is to be predicted, and which it is: each by those before it."""
    wanted = batch.labels[:, 1:] != IGNORED
    logits: Tensor = model.peft(**batch.model_inputs()).logits
    return logits[:, :-1][wanted], batch.labels[:, 1:][wanted]


OBJECTIVE = Generation()
