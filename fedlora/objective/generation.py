"""Generation: the next token of a dialogue, by a causal language model; scored by its loss on held-out responses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fedlora.config import DataConfig, ModelConfig, RunConfig
from fedlora.config.generate import GenerateConfig
from fedlora.data import dialogues, questions, tokens
from fedlora.data.batches import Batch, evaluation_batches
from fedlora.data.questions import Questions
from fedlora.data.sources import Draft, LabelledText
from fedlora.data.tokens import Examples, Padding
from fedlora.data.turns import Turns, with_marks
from fedlora.errors import ConfigError, ModelError
from fedlora.model import prediction, writing
from fedlora.model.apart import keeps_apart
from fedlora.model.base import check_writer, load_writer
from fedlora.model.known import KNOWN
from fedlora.objective import scorers
from fedlora.objective.base import Loss, Objective, Resident, Score, Scores, check_groups
from fedlora.objective.scorers import Scorer, sandbox
from fedlora.objective.scorers.judging import Judged, judged, metric_of

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class TokenScores(Scores):
    """Summed cross-entropy in nats of the tokens that are to be predicted, how many they are, how many were the
    likeliest, and of how many examples."""

    loss_sum: float = 0.0
    tokens: int = 0
    hits: int = 0
    count: int = 0
    judged: Judged = field(default_factory=Judged)
    """What answers to some of the examples came to."""

    def __add__(self, other: TokenScores) -> TokenScores:
        return TokenScores(
            self.loss_sum + other.loss_sum,
            self.tokens + other.tokens,
            self.hits + other.hits,
            self.count + other.count,
            self.judged + other.judged,
        )

    @property
    def examples(self) -> int:
        return self.count

    @property
    def loss(self) -> float:
        """Mean cross-entropy per token, in nats."""
        return self.loss_sum / self.tokens

    def values(self) -> dict[str, float]:
        if not self.tokens:
            return self.judged.values()
        perplexity = math.exp(min(self.loss, 700.0))  # beyond, a float is infinite
        found = {"loss": self.loss, "perplexity": perplexity, "token_accuracy": self.hits / self.tokens}
        return {**found, "tokens": float(self.tokens), **self.judged.values()}

    @property
    def answers(self) -> Sequence[Mapping[str, Any]]:
        return self.judged.shown

    def to_json(self) -> dict[str, Any]:
        counts = {"loss_sum": self.loss_sum, "tokens": self.tokens, "hits": self.hits, "count": self.count}
        return counts | ({"judged": self.judged.to_json()} if self.judged.count else {})

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TokenScores:
        counts = [content[name] for name in ("tokens", "hits", "count")]
        loss_sum = content["loss_sum"]
        if any(type(each) is not int or each < 0 for each in counts) or type(loss_sum) is not float:
            raise ValueError("scores are counts, and a loss")
        if not counts[1] <= counts[0] or not counts[2] <= counts[0]:
            raise ValueError("scores are of fewer tokens than they count")
        judged = Judged.from_json(content["judged"]) if "judged" in content else Judged()
        return cls(loss_sum, counts[0], counts[1], counts[2], judged)


LOSS = Score("loss", higher_is_better=False, low=0.0, high=math.inf, title="loss", unit="nats per token")
TOKEN_ACCURACY = Score("token_accuracy", higher_is_better=True, low=0.0, high=1.0, title="token accuracy", unit="share")


def _mean_by(scorer: Scorer) -> Score:
    """What answers are worth by a scorer, on average."""
    unit = "share of answers"
    return Score(metric_of(scorer.name), higher_is_better=True, low=0.0, high=1.0, title=scorer.title, unit=unit)


class Generation(Objective):
    """What an assistant says: cross-entropy of the next token, a unit a token that is trained."""

    name: ClassVar[str] = "generation"
    scores: ClassVar[type[Scores]] = TokenScores
    labelled: ClassVar[bool] = False
    writes: ClassVar[bool] = True
    beside: ClassVar[Sequence[Score]] = (LOSS, TOKEN_ACCURACY)

    def score_of(self, config: RunConfig) -> Score:
        how = config.evaluation.generate
        return _mean_by(scorers.find(how.scorers[0])) if how.scorers and how.decides == "scorer" else LOSS

    def scores_of(self, config: RunConfig) -> tuple[Score, ...]:
        judged = (_mean_by(scorers.find(name)) for name in config.evaluation.generate.scorers)
        found = {each.name: each for each in (self.score_of(config), *judged, *self.beside)}
        return tuple(found.values())

    def locally(self, config: RunConfig) -> tuple[Score, ...]:
        return tuple({each.name: each for each in (self.score_of(config), LOSS)}.values())

    def check(self, config: RunConfig) -> None:
        check_groups(config)
        _check_columns(config.data)
        if config.model.pooling != "auto":
            raise ConfigError(f"model.pooling={config.model.pooling} is for task=classification; leave it out")
        for name in config.evaluation.generate.scorers:
            if scorers.find(name).runs_code and not config.evaluation.execute_code:
                raise ConfigError(
                    f"evaluation.generate.scorers={name} runs Python that the model has written; set "
                    "evaluation.execute_code=true where you accept that (docs/howto/read-answers.md)"
                )

    def notices(self, config: RunConfig) -> Sequence[str]:
        running = [name for name in config.evaluation.generate.scorers if scorers.find(name).runs_code]
        if not running:
            return ()
        return (
            f"evaluation.execute_code=true: Python that the model writes is run to judge it ({', '.join(running)}), "
            f"with limits ({sandbox.isolation().words})",
        )

    def check_examples(self, config: RunConfig, test: pa.Table, train: pa.Table) -> None:
        if not config.evaluation.generate.scorers:
            return
        known = questions.references(test, questions.options_of(train))
        for name in config.evaluation.generate.scorers:
            scorers.check(scorers.find(name), known)

    def draft(self, data: DataConfig, by: str | None, seed: int, light: bool = False) -> Draft:
        return dialogues.read(data, by, seed)

    def tokenise(self, text: LabelledText, tokenizer: Any, data: DataConfig, cache: Path) -> Path:
        tokenizer.padding_side = "right"  # so that a token stands where it would stand alone, in training and scoring
        turns = Turns(tokenizer, data.max_length, data.loss_on, data.too_long, data.chat_template)
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
        name = f'"{config.name}"'
        where = f"fedlora.model.resolve({name})" if config.name in KNOWN else name
        return f"`transformers.AutoModelForCausalLM.from_pretrained({where})`.", ""

    def task_type(self, network: nn.Module) -> str | None:
        return "CAUSAL_LM"

    def loss(self, model: Resident, batch: Batch) -> Loss:
        places, targets = _predicted(batch)
        with model.autocast():
            mean = prediction.cross_entropy(model.peft.get_base_model(), batch.model_inputs(), places, targets)
        return Loss(mean, len(targets))

    def by_row(self, model: Resident, batch: Batch) -> Tensor:
        places, targets = _predicted(batch)
        with model.autocast():
            found = prediction.each(model.peft.get_base_model(), batch.model_inputs(), places, targets)
        return found.new_zeros(batch.labels.numel()).index_copy(0, places, found).reshape(batch.labels.shape).sum(1)

    def get_ready(self, model: Resident) -> None:
        with model.autocast():
            prediction.has_halves(model.peft.get_base_model())

    def units(self, batch: Batch) -> int:
        return len(batch.places())

    def check_model(self, config: RunConfig, model: Resident) -> None:
        if config.training.packing and not keeps_apart(model):
            raise ModelError(
                f"training.packing=true: model.name={config.model.name} lets examples of one row see each other with "
                "the attention that it has here; leave training.packing out, or set model.attention=sdpa"
            )

    def evaluate(self, model: Resident, examples: Examples, batch_size: int, padding: Padding) -> TokenScores:
        loss_sum, found, hits = torch.zeros((), dtype=torch.float64), 0, 0
        network = model.peft.eval().get_base_model()
        with torch.inference_mode(), model.autocast():
            for batch in evaluation_batches(examples, batch_size, padding):
                on_device = batch.to(model.device)
                places, targets = _predicted(on_device)
                more, right = prediction.measured(network, on_device.model_inputs(), places, targets)
                loss_sum, hits, found = loss_sum + more, hits + right, found + len(targets)
        return TokenScores(float(loss_sum), found, hits, len(examples))

    def answer(
        self, model: Resident, asked: Questions, tokenizer: Any, how: GenerateConfig, show: Sequence[int] = ()
    ) -> TokenScores:
        with_marks(tokenizer)
        marks, found = writing.Marks.of(model.peft, tokenizer), {}
        asking = [scorers.find(name) for name in how.scorers]
        if not all(scorer.chooses for scorer in asking):
            written = writing.write(model, asked.asked, how, marks)
            texts = [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
        for scorer in asking:
            found[scorer] = _chosen(model, asked, tokenizer, scorer, marks.pad) if scorer.chooses else texts
        return TokenScores(judged=judged(found, asked, show))


def _chosen(model: Resident, asked: Questions, tokenizer: Any, scorer: Scorer, pad: int) -> list[str]:
    """The likeliest option for each question."""
    options = [each.options for each in asked.references]
    ids = [
        [np.array(row, dtype=np.int32) for row in tokenizer(list(each), add_special_tokens=False)["input_ids"]]
        for each in options
    ]
    lengths = [[len(text.encode()) if scorer.by_length else 1 for text in each] for each in options]
    best = writing.likeliest(model, asked.asked, ids, lengths, pad)
    return [each[position] for each, position in zip(options, best, strict=True)]


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


def _predicted(batch: Batch) -> tuple[Tensor, Tensor]:
    """Where (places of batch × tokens, flat) a token is to be predicted, and which it is: each by those before it."""
    places = batch.places()
    return places, batch.following().index_select(0, places)


OBJECTIVE = Generation()
