"""The part of a configuration that says whether test examples are answered in writing, how, and how that is judged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fedlora.sections import Section, words


class GenerateConfig(Section):
    """Answers that the model writes to test examples (`task=generation`), and what is made of them."""

    scorers: Annotated[list[str], BeforeValidator(words)] = Field(default_factory=list)
    """How answers are judged: `exact`, `numeric`, `choice`, `choice-normalised`, `rouge-l`, `code`, or a plug-in's. The
    first is the score that decides. Empty: nothing is written, and the held-out loss decides."""
    decides: Literal["scorer", "loss"] = "scorer"
    """With scorers: whether the first of them decides, or still the held-out loss, which fewer examples can tell."""
    every: int | None = Field(None, ge=1)
    """Answer every N rounds; before round one and after the last always. Empty: as often as `share` allows."""
    share: float = Field(0.2, gt=0, le=1)
    """Where `every` is empty: the most that writing may take of a round, on average, counted in tokens."""
    examples: int = Field(64, ge=1)
    """Test examples that are answered, drawn by seed; the same in every round."""
    local_examples: int = Field(0, ge=0)
    """Of a client's own test examples, as many are answered by its model after its training: for the local score and
    the gap. 0: none."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer in tokens."""
    batch_size: int = Field(16, ge=1)
    """Answers that are written together."""
    temperature: float = Field(0.0, ge=0)
    """0: the likeliest token each time (greedy). Above: tokens are drawn, by seed."""
    top_p: float = Field(1.0, gt=0, le=1)
    """With a `temperature`: draw from the likeliest tokens that together have this probability."""
    shown: int = Field(20, ge=0)
    """Answers that are kept each time, with prompt, reference and verdicts (`tables/answers.json`)."""
