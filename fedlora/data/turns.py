"""Dialogues as tokens: the model's own chat template, or one of ours, and which tokens are trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fedlora.data.dialogues import Message
from fedlora.errors import DataError, ModelError, counted

IGNORED = -100
"""The target of a token that is not trained."""
Chat = Literal["auto", "plain", "chatml"]
"""Which chat template: the model's own where it has one, or one of `OURS`."""
OURS: dict[str, dict[str, str]] = {
    "plain": {"system": "{content}\n\n", "user": "### Instruction:\n{content}\n\n", "assistant": "### Response:\n"},
    "chatml": {
        "system": "<|im_start|>system\n{content}{end}\n",
        "user": "<|im_start|>user\n{content}{end}\n",
        "assistant": "<|im_start|>assistant\n",
        "after": "\n",
    },
}
"""Alpaca's form, and ChatML with the tokenizer's own end mark. What the assistant says is followed by that mark, and
then by `after`."""
ENDS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]")
"""Words of a vocabulary that may end a text, the first that is there, where a tokenizer does not say which does."""
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
        chat: the form that a dialogue gets.

    Raises:
        ModelError: the tokenizer has no end token and no word that may be one, or cannot tell where a token stands in
            the text.
    """

    tokenizer: Any
    max_length: int
    loss_on: Literal["response", "all"] = "response"
    too_long: Literal["drop", "cut"] = "drop"
    chat: Chat = "auto"
    counts: Counter[str] = field(default_factory=Counter)
    marks: list[str] = field(default_factory=list)
    """What was done about marks that the tokenizer lacks."""

    def __post_init__(self) -> None:
        self.marks = with_marks(self.tokenizer)
        if not self.tokenizer.is_fast:
            raise ModelError(
                "the model's tokenizer does not tell where a token stands in the text (it has no tokenizer.json), so "
                "that responses cannot be told from prompts; convert it to a fast one"
            )

    def encode(self, dialogues: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[int]] | None]:
        """Token ids, and targets of the same length (the id, or `IGNORED`); None for an example that is left out.

        Raises:
            DataError: the chat template does not take a dialogue, or does not keep what was said before; or there is
                none, and none was chosen, for dialogues of several turns.
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
        if not self._own:
            if self.chat == "auto" and [each["role"] for each in messages] != ["user", "assistant"]:
                raise DataError(
                    "the data has dialogues of several turns, or with a system message, and the model's tokenizer has "
                    "no chat template; choose one: data.chat_template=plain or chatml"
                )
            return self._written(messages)
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
        if self._own:
            return self._templated(messages, answer=True)
        return self._written(messages)[0] + self._form["assistant"]

    def described(self) -> list[str | None]:
        """All but the words and the length that decides which tokens a dialogue becomes."""
        marks = [self.tokenizer.bos_token, self.tokenizer.eos_token]
        return [self.loss_on, self.too_long, self.chat, *marks, self.tokenizer.chat_template if self._own else None]

    @property
    def _own(self) -> bool:
        """Whether the model's chat template is used."""
        return self.chat == "auto" and bool(self.tokenizer.chat_template)

    @property
    def _form(self) -> dict[str, str]:
        return OURS["plain" if self.chat == "auto" else self.chat]

    def _templated(self, messages: Sequence[Message], answer: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        except Exception as error:  # whatever a template of somebody's raises
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"the model's chat template does not take a dialogue of the data: {reason}") from error
        return text

    def _written(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        form, end, begin = self._form, self.tokenizer.eos_token, self.tokenizer.bos_token or ""
        text, spans = "" if form["user"].startswith(begin) else begin, []
        for each in messages:
            text += form[each["role"]].format(content=each["content"], end=end)
            if each["role"] == "assistant":
                spans.append((len(text), len(text) + len(each["content"]) + len(end)))
                text += each["content"] + end + form.get("after", "")
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
        return self.marks + [
            f"{counted(self.counts[what], 'example')} {words} ({self.max_length})"
            for what, words in told.items()
            if self.counts[what]
        ]


def with_marks(tokenizer: Any) -> list[str]:
    """Give a tokenizer the end mark and the padding that it lacks; what was done, a line each.

    Raises:
        ModelError: it has no end mark, and no word that may be one.
    """
    notes = []
    if tokenizer.eos_token_id is None:
        words = tokenizer.get_vocab()
        end = next((word for word in ENDS if word in words), None)
        if end is None:
            raise ModelError(
                "the model's tokenizer has no end token, so no answer would end, nor a word that may be one "
                f"({', '.join(ENDS)}); set eos_token in its tokenizer_config.json, or choose another model"
            )
        tokenizer.eos_token = end
        notes.append(f"the model's tokenizer names no end token: {end} of its vocabulary is taken")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token == tokenizer.eos_token and not tokenizer.init_kwargs.get("pad_token"):  # whoever set it
        notes.append("the model's tokenizer names no padding token: its end token is taken, and masked where it pads")
    return notes
