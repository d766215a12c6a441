"""Dialogues as tokens: the model's own chat template, or a plain one, and which tokens are trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedlora.data.dialogues import Message
from fedlora.errors import DataError, ModelError, counted

IGNORED = -100
"""The target of a token that is not trained."""
PLAIN = {"system": "{content}\n\n", "user": "### Instruction:\n{content}\n\n", "assistant": "### Response:\n"}
"""Without a chat template of the model's own: Alpaca's form. What the assistant says is followed by the end mark."""
_FOR_THE_PROMPT = 4
"""A response that is cut leaves a quarter of the row to the prompt."""


@dataclass
class Turns:
    """Turns dialogues into tokens and targets, and counts what did not fit.

    Args:
        tokenizer: a fast one, with an end token.
        max_length: most tokens of an example.
        loss_on: what is trained: the assistant's turns, or all.
        too_long: what becomes of an example whose last response does not fit.

    Raises:
        ModelError: the tokenizer has no end token, or cannot tell where a token stands in the text.
    """

    tokenizer: Any
    max_length: int
    loss_on: Literal["response", "all"] = "response"
    too_long: Literal["drop", "cut"] = "drop"
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ModelError("the model's tokenizer has no end token, so no answer would end; choose another")
        if not self.tokenizer.is_fast:
            raise ModelError(
                "the model's tokenizer does not tell where a token stands in the text (it has no tokenizer.json), so "
                "that responses cannot be told from prompts; convert it to a fast one"
            )

    def encode(self, dialogues: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[int]] | None]:
        """Token ids, and targets of the same length (the id, or `IGNORED`); None for an example that is left out.

        Raises:
            DataError: the chat template does not take a dialogue, or does not keep what was said before.
        """
        rendered = [self.render(messages) for messages in dialogues]
        found = self.tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        return [
            self._fitted(ids, offsets, spans)
            for ids, offsets, (_, spans) in zip(found["input_ids"], found["offset_mapping"], rendered, strict=True)
        ]

    def render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a dialogue, and from where to where (in characters) the assistant speaks, end marks included."""
        if not self.tokenizer.chat_template:
            return self._plain(messages)
        text, spans = self._templated(messages), []
        for position, each in enumerate(messages):
            if each["role"] == "assistant":
                before = self._templated(messages[:position], answer=True)
                until = self._templated(messages[: position + 1])
                if not (until.startswith(before) and text.startswith(until)):
                    raise DataError(
                        "the model's chat template writes earlier turns anew when later ones come, so that what the "
                        "assistant says cannot be told apart; set data.loss_on=all, or use dialogues of one turn"
                    )
                spans.append((len(before), len(until)))
        return text, spans

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of a dialogue up to where the assistant is to speak."""
        if self.tokenizer.chat_template:
            return self._templated(messages, answer=True)
        return self._plain(messages)[0] + PLAIN["assistant"]

    def _templated(self, messages: Sequence[Message], answer: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        except Exception as error:  # whatever a template of somebody's raises
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"the model's chat template does not take a dialogue of the data: {reason}") from error
        return text

    def _plain(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        text, spans = self.tokenizer.bos_token or "", []
        for each in messages:
            text += PLAIN[each["role"]].format(content=each["content"])
            if each["role"] == "assistant":
                spans.append((len(text), len(text) + len(each["content"]) + len(self.tokenizer.eos_token)))
                text += each["content"] + self.tokenizer.eos_token
        return text, spans

    def _fitted(
        self, ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]
    ) -> tuple[list[int], list[int]] | None:
        spoken = [any(begin <= start and stop <= end for begin, end in spans) for start, stop in offsets]
        trained = spoken if self.loss_on == "response" else [True] * len(ids)
        targets = [token if wanted else IGNORED for token, wanted in zip(ids, trained, strict=True)]
        kept = range(len(ids))
        if len(ids) > self.max_length:
            first = next(i for i, (start, _) in enumerate(offsets) if start >= spans[-1][0])
            if len(ids) - first < self.max_length:  # its beginning goes, the response stays whole
                self.counts["prompts cut"] += 1
                return ids[-self.max_length :], targets[-self.max_length :]
            if self.too_long == "drop":
                self.counts["left out"] += 1
                return None
            self.counts["responses cut"] += 1
            prompt = min(first, self.max_length // _FOR_THE_PROMPT)
            last = max(i for i, said in enumerate(spoken) if said)
            end = next((i for i in range(last, first, -1) if ids[i] in self.tokenizer.all_special_ids), last)
            kept = [*range(first - prompt, first), *range(first, first + self.max_length - prompt - 1), end]  # type: ignore[assignment]
        chosen = [ids[i] for i in kept], [targets[i] for i in kept]
        if all(target == IGNORED for target in chosen[1][1:]):  # the first token is predicted by nothing
            self.counts["left out"] += 1
            return None
        return chosen

    def notes(self) -> list[str]:
        """What did not fit, a line each."""
        told = {
            "left out": "of which no response fits in data.max_length left out (data.too_long=cut would cut them)",
            "responses cut": "whose response is longer than data.max_length cut, with the end mark kept",
            "prompts cut": "longer than data.max_length: the prompt is cut at its beginning",
        }
        return [
            f"{counted(self.counts[what], 'example')} {words} ({self.max_length})"
            for what, words in told.items()
            if self.counts[what]
        ]
