"""The longest common subsequence of words."""

from __future__ import annotations

from typing import Any, ClassVar

from fedlora.data.questions import Reference
from fedlora.errors import ConfigError
from fedlora.objective.scorers.base import Scorer


class RougeL(Scorer):
    """ROUGE-L, its F measure, with stems, by Google's `rouge-score` (extra `rouge`)."""

    name: ClassVar[str] = "rouge-l"
    title: ClassVar[str] = "ROUGE-L"
    expects: ClassVar[str] = "a response"

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
            from rouge_score.tokenizers import DefaultTokenizer  # type: ignore[import-untyped]
        except ImportError:
            raise ConfigError(
                "evaluation.generate.scorers=rouge-l needs the library rouge-score; `pip install 'fedlora[rouge]'`"
            ) from None
        # Without a tokenizer it says so to absl's log, which then prints every other library's on the terminal.
        self._rouge: Any = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))

    def judge(self, answer: str, reference: Reference) -> float:
        return float(self._rouge.score(reference.answer, answer)["rougeL"].fmeasure)
