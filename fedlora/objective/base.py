"""The contract of an objective: what a batch means. Which network learns it, what its loss is, and how it is scored.

Nothing outside `fedlora.objective` asks which one it is. A new one is one file here, called as `task` in a
configuration, with an `OBJECTIVE` in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from fedlora.config import DataConfig, ModelConfig, RunConfig
from fedlora.config.generate import GenerateConfig
from fedlora.data.batches import Batch
from fedlora.data.questions import Questions
from fedlora.data.sources import Draft, LabelledText
from fedlora.data.tokens import Examples, Padding
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Score:
    """A score, and how it is read. One of them decides: champions, leaderboards and reports go by it."""

    name: str
    """One of `Scores.values`."""
    higher_is_better: bool
    low: float
    high: float
    """What it cannot leave."""
    title: str
    """What people read."""
    unit: str
    """In words, of an axis."""
    proportion: bool = False
    """Whether it is a share of the examples, each of which is right or wrong: then one run tells its standard error."""

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1: of values times it, the highest is the best."""
        return 1 if self.higher_is_better else -1


class Loss(NamedTuple):
    """What a step minimises: a mean (a scalar with a gradient), and the number of units that it is over."""

    mean: Tensor
    units: int


class Scores(ABC):
    """How good a model is on some examples. Those of parts of a set add up to those of the whole, exactly."""

    @abstractmethod
    def __add__(self, other: Self) -> Self: ...

    @property
    @abstractmethod
    def examples(self) -> int:
        """How many examples they are of."""

    @property
    @abstractmethod
    def loss(self) -> float:
        """Mean loss per unit. Only where there are examples."""

    @abstractmethod
    def values(self) -> dict[str, float]:
        """The scores by their names, `loss` among them. Only where there are examples."""

    @property
    def answers(self) -> Sequence[Mapping[str, Any]]:
        """Some of what was written, a row of a table each."""
        return ()

    @abstractmethod
    def to_json(self) -> dict[str, Any]: ...

    @classmethod
    @abstractmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Raises:
        KeyError, TypeError, ValueError: these are no such scores.
        """


class Resident(Protocol):
    """What an objective needs of the model in memory (`fedlora.model.resident`)."""

    peft: Any
    """The network with its adapter."""
    device: torch.device
    labels: Sequence[str]

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of the configured precision."""


WITHOUT_LABELS = ("iid", "quantity", "natural-id")
"""Partitioners that look at no label."""


def check_groups(config: RunConfig) -> None:
    """Refuse a partition by label where examples have none, and no column stands for it.

    Raises:
        ConfigError: it says what to set.
    """
    if config.partition.name not in WITHOUT_LABELS and config.partition.by is None:
        raise ConfigError(
            f"partition.name={config.partition.name} deals examples by label, and task={config.task} has none; set "
            f"partition.by to a column whose values may stand for it, or partition.name to one of "
            f"{', '.join(WITHOUT_LABELS)}"
        )


class Objective(ABC):
    """What a batch means."""

    name: ClassVar[str]
    """The `task` of a configuration."""
    scores: ClassVar[type[Scores]]
    labelled: ClassVar[bool]
    """Whether the labels are what is learned; otherwise they are groups that a partition may go by."""

    writes: ClassVar[bool] = False
    """Whether test examples can be answered in writing (`answer`)."""
    beside: ClassVar[Sequence[Score]]
    """The scores that tables show beside the deciding one, which may be among them."""

    @abstractmethod
    def score_of(self, config: RunConfig) -> Score:
        """The score that decides in runs of this configuration."""

    def scores_of(self, config: RunConfig) -> tuple[Score, ...]:
        """Those scores that tables show of runs of this configuration: the deciding one, then the others."""
        decides = self.score_of(config)
        return (decides, *(each for each in self.beside if each.name != decides.name))

    def locally(self, config: RunConfig) -> tuple[Score, ...]:
        """Those scores that are also measured by client, with their gap: the deciding one."""
        return (self.score_of(config),)

    def notices(self, config: RunConfig) -> Sequence[str]:
        """What a person should know before a run begins, a line each."""
        return ()

    @abstractmethod
    def check(self, config: RunConfig) -> None:
        """Refuse settings that are none of this objective's, or that it lacks.

        Raises:
            ConfigError: names the key, the value and what to do.
        """

    def check_examples(self, config: RunConfig, test: pa.Table, train: pa.Table) -> None:  # noqa: B027
        """Refuse test examples that cannot be scored as configured.

        Raises:
            DataError: there are such.
        """

    @abstractmethod
    def draft(self, data: DataConfig, by: str | None, seed: int, light: bool = False) -> Draft:
        """Read and check the examples.

        Args:
            data: where they are.
            by: column that a partition goes by where examples have no labels.
            seed: of the run.
            light: labels and owners alone will do.

        Raises:
            DataError: they cannot be read, or are no examples of this.
        """

    @abstractmethod
    def tokenise(self, text: LabelledText, tokenizer: Any, data: DataConfig, cache: Path) -> Path:
        """The folder with the examples as tokens (`fedlora.data.tokens.tokenise`).

        Raises:
            DataError: they do not become tokens, or the cache cannot be written.
            ModelError: the tokenizer is none for this.
        """

    @abstractmethod
    def bare(self, config: ModelConfig, declared: Any) -> nn.Module:
        """The network as its configuration declares it, for torch's `meta` device.

        Raises:
            ValueError: Transformers has no such class for the architecture.
        """

    @abstractmethod
    def load(self, config: ModelConfig, labels: Sequence[str], pad_token_id: int | None, seed: int) -> nn.Module:
        """The network on the pre-trained weights; what it needs besides them is drawn by `seed`.

        Raises:
            ModelError: it cannot be loaded, or learns no such thing.
        """

    @abstractmethod
    def with_peft_alone(self, config: ModelConfig, labels: int, changed: bool) -> tuple[str, str]:
        """How the base is made for `PeftModel.from_pretrained`, and another way where there is one, in Markdown.

        Args:
            config: of the base.
            labels: how many there are.
            changed: whether the strategy changed the base.
        """

    @abstractmethod
    def task_type(self, network: nn.Module) -> str | None:
        """PEFT's name for what the network does; None where PEFT has none."""

    @abstractmethod
    def loss(self, model: Resident, batch: Batch) -> Loss:
        """Of a batch on the model's device."""

    @abstractmethod
    def by_row(self, model: Resident, batch: Batch) -> Tensor:
        """The loss of each row of a batch on the model's device: the sum over its units, with gradients (rows). Of the
        batches of several clients in one, each client's mean is made of its own rows."""

    def get_ready(self, model: Resident) -> None:  # noqa: B027
        """Find out what is to be known of a model before the batches of several clients go through it."""

    def units(self, batch: Batch) -> int:
        """How many units the loss of a batch is over, as `loss` will say: an example each."""
        return len(batch)

    def check_model(self, config: RunConfig, model: Resident) -> None:  # noqa: B027
        """Refuse a model in memory that cannot be trained as configured.

        Raises:
            ModelError: names the key and what to do.
        """

    @abstractmethod
    def evaluate(self, model: Resident, examples: Examples, batch_size: int, padding: Padding) -> Scores:
        """Score the model with the adapter that is loaded in it: every example once, without gradients."""

    def answer(
        self, model: Resident, asked: Questions, tokenizer: Any, how: GenerateConfig, show: Sequence[int] = ()
    ) -> Scores:
        """Let the model answer questions with the adapter that is loaded in it, and judge what it says.

        Args:
            model: with its adapter.
            asked: test examples.
            tokenizer: of the model.
            how: answers are written and judged.
            show: rows of the test set whose answers are kept.
        """
        raise NotImplementedError(f"task={self.name} writes nothing")
