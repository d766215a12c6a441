"""The part of a configuration that describes the adapter: its variant, and the ranks of the clients."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from fedlora.sections import Section, words


class RankRule(Section):
    """Ranks by what clients show: all start low, the best rise after round one (arXiv 2406.17477)."""

    low: int = Field(5, ge=1)
    """Rank of every client in round one, and of most after it."""
    high: int = Field(20, ge=1)
    """Rank of the best clients from round two on."""
    share: float = Field(0.1, gt=0, lt=1)
    """Share of the clients that rise: those with the lowest loss on a tenth of their data held out in round one."""

    @model_validator(mode="after")
    def _rises(self) -> RankRule:
        if self.high <= self.low:
            raise ValueError(f"high={self.high} should be above low={self.low}")
        return self


REGISTRY = "models:/"
"""What `init` begins with where it names a model of MLflow's registry."""
Ranks = list[int] | dict[int, float] | RankRule

_LIST_OR_SHARES: TypeAdapter[list[int] | dict[int, float]] = TypeAdapter(
    list[int] | dict[int, float], config=ConfigDict(allow_inf_nan=False)
)
_EXPECTED_RANKS = (
    "expected a list with one whole number per client ([2, 4, 8]), shares of ranks ({4: 0.7, 16: 0.3}), "
    "or a rule ({low: 5, high: 20, share: 0.1})"
)


def _ranks(value: Any) -> Any:
    """`4,8,8` on a command line means a list; a mapping is a rule where it holds its keys, otherwise shares."""
    if isinstance(value, str):
        value = words(value)
    if value is None or isinstance(value, RankRule):
        return value
    if value == {}:
        raise ValueError(_EXPECTED_RANKS)
    if isinstance(value, Mapping) and set(map(str, value)) & set(RankRule.model_fields):
        if unknown := [key for key in value if key not in RankRule.model_fields]:
            raise ValueError(f"a rule has the keys {', '.join(RankRule.model_fields)}, not '{unknown[0]}'")
        return RankRule.model_validate(value)
    try:
        return _LIST_OR_SHARES.validate_python(value)
    except ValidationError:  # a union's own complaint names types of Python
        raise ValueError(_EXPECTED_RANKS) from None


ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the one that puts out the next token."""
_PLAIN = re.compile(r"[\w.\-,\s]*")
"""Names, and what is between them in a list."""


def _modules(value: Any) -> Any:
    """What is more than names with commas is an expression."""
    if not isinstance(value, str) or value == ALL_LINEAR:
        return value
    if _PLAIN.fullmatch(value):
        return words(value)
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"'{value}' is no regular expression ({error}); expected names, or .*self_attn.*") from None
    return value


def divisor(rank: int, root: bool) -> float:
    """What alpha is divided by: the rank, or its square root for rsLoRA."""
    return math.sqrt(rank) if root else rank


class LoraConfig(Section):
    """The adapter that is trained."""

    variant: Literal["lora", "rslora", "dora", "hira"] = "lora"
    """`lora` scales the product B·A by alpha/rank, `rslora` by alpha/sqrt(rank). `dora` adds a trained magnitude per
    output; `hira` multiplies B·A with the base weight, element by element, and has no scaling."""
    rank: int = Field(8, ge=1)
    """Rank r of every adapted module."""
    alpha: float = Field(16, gt=0)
    """Numerator of the scaling."""
    ranks: Annotated[Ranks | None, BeforeValidator(_ranks)] = None
    """Ranks of the clients, where they differ; every rank then has the scaling that alpha and `rank` give. A list with
    one rank per client; shares, {4: 0.7, 16: 0.3}, dealt by seed; or a rule, {low: 5, high: 20, share: 0.1}: all start
    low, and after round one the best rise. Empty: all have `rank`."""
    truncation: Literal["first", "svd"] = "first"
    """What a client of a lower rank receives: the first indices of the global factors as they are, or (`svd`) after
    these were put in the order of the singular values of their product."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    target_modules: Annotated[list[str] | str | None, BeforeValidator(_modules)] = None
    """Names (or name endings) of the linear layers or embeddings to adapt; or `all-linear`, every linear layer but the
    output's; or a regular expression for whole names, like `.*\\.[0-3]\\.self_attn\\..*`. Empty: PEFT's choice for the
    architecture, mostly the query and value projections, or these where PEFT has none. Embeddings and the output layer
    are adapted only where this names them."""
    exclude_modules: Annotated[list[str] | str | None, BeforeValidator(_modules)] = None
    """Names (or name endings) of modules to leave out of those, or a regular expression for whole names."""

    init: str | None = None
    """Start from an adapter that there is: a PEFT folder, the folder of a finished run, or, for `fedlora run`,
    `models:/NAME@ALIAS` of MLflow's registry. Its modules, ranks and scaling must be those configured here. Empty: A
    random and B zero, drawn by seed."""

    @field_validator("ranks")
    @classmethod
    def _possible_ranks(cls, value: Ranks | None) -> Ranks | None:
        if isinstance(value, RankRule) or value is None:
            return value
        if not value or min(value) < 1:
            raise ValueError("ranks are whole numbers from 1")
        if isinstance(value, dict) and (min(value.values()) <= 0 or abs(sum(value.values()) - 1) > 1e-6):
            raise ValueError("shares of ranks are positive and add up to 1")
        return value

    @property
    def scaling(self) -> float:
        """The factor s in `s·B·A`, the same for clients of every rank."""
        if self.variant == "hira":
            return 1.0
        return self.alpha / divisor(self.rank, self.variant == "rslora")

    def alpha_at(self, rank: int) -> float:
        """The alpha that gives an adapter of another rank the same scaling."""
        return self.scaling * divisor(rank, self.variant == "rslora")

    @property
    def highest_rank(self) -> int:
        """The rank of the global adapter: the highest that a client may have."""
        if isinstance(self.ranks, RankRule):
            return self.ranks.high
        return max(self.ranks) if self.ranks else self.rank

    @property
    def mixed_ranks(self) -> bool:
        """Whether clients may have different ranks."""
        return isinstance(self.ranks, RankRule) or len(set(self.ranks or ())) > 1
