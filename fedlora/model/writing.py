"""What a causal language model writes after a prompt, and which of some options it thinks likeliest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedlora.config.generate import GenerateConfig
from fedlora.data.turns import IGNORED

Ids = npt.NDArray[np.int32]
_ROWS = 32
"""Options that are scored together."""


class Writer(Protocol):
    """A causal language model in memory (`fedlora.model.resident`)."""

    @property
    def peft(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    def autocast(self) -> AbstractContextManager[Any]: ...


class Marks(NamedTuple):
    """Token ids with a meaning: what rows are filled up with, and what ends an answer."""

    pad: int
    ends: tuple[int, ...]

    @classmethod
    def of(cls, network: Any, tokenizer: Any) -> Marks:
        """Those of a tokenizer, and the ends that the model itself declares (chat models have several)."""
        declared = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
        more = declared if isinstance(declared, list) else [declared]
        ends = dict.fromkeys([tokenizer.eos_token_id, *(each for each in more if each is not None)])
        return cls(tokenizer.pad_token_id, tuple(ends))


def write(model: Writer, prompts: Sequence[Ids], how: GenerateConfig, marks: Marks) -> list[list[int]]:
    """Token ids of an answer to each prompt, without end marks: batches of prompts of like length, filled up on the
    left, with a key–value cache. Draws, where a temperature asks for them, are from torch's generator of the device."""
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    answers: list[list[int]] = [[] for _ in prompts]
    settings = _settings(how, marks)
    model.peft.eval()
    with torch.inference_mode(), model.autocast():
        for start in range(0, len(order), how.batch_size):
            rows = order[start : start + how.batch_size]
            ids, mask = _filled_left([prompts[row] for row in rows], marks.pad, model.device)
            found = model.peft.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
            for row, written in zip(rows, found[:, ids.shape[1] :].tolist(), strict=True):
                answers[row] = _until(written, marks.ends)
    return answers


def likeliest(
    model: Writer, prompts: Sequence[Ids], options: Sequence[Sequence[Ids]], lengths: Sequence[Sequence[int]], pad: int
) -> list[int]:
    """Which of its options a model thinks likeliest after each prompt: the sum of the log-likelihoods of its tokens,
    divided by its length.

    Args:
        model: with the adapter that is to be judged.
        prompts: token ids.
        options: token ids, for each prompt.
        lengths: what an option's sum is divided by; ones for a plain sum.
        pad: fills rows up, on the right.
    """
    flat = [(number, choice) for number, each in enumerate(options) for choice in range(len(each))]
    found = [np.full(len(each), -np.inf) for each in options]
    model.peft.eval()
    with torch.inference_mode(), model.autocast():
        for start in range(0, len(flat), _ROWS):
            rows = flat[start : start + _ROWS]
            sums = _log_likelihoods(model, [(prompts[n], options[n][c]) for n, c in rows], pad)
            for (number, choice), value in zip(rows, sums, strict=True):
                found[number][choice] = value / lengths[number][choice]
    return [int(each.argmax()) for each in found]


def _log_likelihoods(model: Writer, pairs: Sequence[tuple[Ids, Ids]], pad: int) -> list[float]:
    """Of what follows in each pair, in nats."""
    longest = max(len(before) + len(after) for before, after in pairs)
    ids = torch.full((len(pairs), longest), pad)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (before, after) in enumerate(pairs):
        whole = torch.from_numpy(np.concatenate([before, after]).astype(np.int64))
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        targets[row, len(before) : len(whole)] = whole[len(before) :]
    ids, mask, targets = (each.to(model.device) for each in (ids, mask, targets))
    logits = model.peft(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets[:, 1:], reduction="none")
    return [-float(each) for each in losses.double().sum(1)]


def _settings(how: GenerateConfig, marks: Marks) -> Any:
    """Ours alone: what a checkpoint recommends for a chat (temperature, penalties) would be another measurement."""
    from transformers import GenerationConfig

    drawn = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        pad_token_id=marks.pad,
        eos_token_id=list(marks.ends),
        use_cache=True,
        repetition_penalty=1.0,
        **(drawn if how.temperature else {"do_sample": False}),
    )


def _filled_left(prompts: Sequence[Ids], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _until(written: Sequence[int], ends: Sequence[int]) -> list[int]:
    return list(itertools.takewhile(lambda token: token not in ends, written))
