"""Using a trained adapter: the base model as it was in training, with the adapter on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.config import ModelConfig
from fedlora.config.generate import GenerateConfig
from fedlora.data.turns import Turns
from fedlora.errors import AdapterError
from fedlora.exchange.description import Description, description
from fedlora.exchange.merging import apply_base_update, attach
from fedlora.model import base as models
from fedlora.model import writing
from fedlora.model.arithmetic import autocast
from fedlora.model.writing import Ids


def load_base(name: str, labels: int | list[str], **options: Any) -> Any:
    """The base classifier that adapters are trained on, for `PeftModel.from_pretrained(base, folder)`.

    Args:
        name: packaged name, Hugging Face id or folder.
        labels: their names, or how many there are.
        options: `pooling`, `dtype`, `revision` as in the configuration.

    Raises:
        ModelError: it cannot be loaded.
    """
    config = ModelConfig(name=name, **options)
    names = [str(index) for index in range(labels)] if isinstance(labels, int) else labels
    return models.load_base(config, names, models.load_tokenizer(config).pad_token_id)


def load_adapter(folder: str | Path, trust_remote_code: bool = False) -> tuple[Any, Any, list[str]]:
    """The model with the adapter in `folder` on it, its tokenizer and the names of its labels (none where it writes),
    ready for inference.

    Where the base model needs Python files of its own, `trust_remote_code` allows them to run: what the folder says
    about it does not count.

    Raises:
        AdapterError: the folder was not written by fedlora, or the adapter does not fit the model.
        ModelError: the base model cannot be loaded.
    """
    path = Path(folder)
    described = description(path)
    base, tokenizer = _base(described, trust_remote_code)
    return apply_base_update(attach(base, path), path).eval(), tokenizer, described.labels


def generate(
    folder: str | Path,
    prompts: Sequence[str],
    how: GenerateConfig | None = None,
    system: str | None = None,
    seed: int = 0,
    with_base: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, list[str]]:
    """What a model writes to some prompts with the adapter in `folder` on it, asked as in training.

    Args:
        folder: of an adapter that was trained with `task=generation`.
        prompts: what a user says, one dialogue each.
        how: length, batches, temperature.
        system: what the system says first.
        seed: of what a temperature draws.
        with_base: also what the base alone writes.
        trust_remote_code: as for `load_adapter`.

    Returns:
        `adapter`, and with the base `base`: an answer for each prompt.

    Raises:
        AdapterError, ModelError: as `load_adapter`, or the adapter writes nothing.
    """
    path, how = Path(folder), how or GenerateConfig(max_new_tokens=256)
    described = description(path)
    if not described.writes:
        raise AdapterError(
            f"{path} is an adapter for task={described.content.get('task', 'classification')}, which writes nothing; "
            "choose one that was trained with task=generation"
        )
    base, tokenizer = _base(described, trust_remote_code)
    first = [{"role": "system", "content": system}] if system else []
    turns = Turns(tokenizer, int(described.content["max_length"]), chat=described.content.get("chat_template", "auto"))
    texts = [turns.prompt([*first, {"role": "user", "content": prompt}]) for prompt in prompts]
    asked = [np.array(ids, dtype=np.int32) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    answers = {"base": _written(base, tokenizer, asked, how, seed)} if with_base else {}
    model = apply_base_update(attach(base, path), path)
    return {"adapter": _written(model, tokenizer, asked, how, seed), **answers}


def _base(described: Description, trust_remote_code: bool) -> tuple[Any, Any]:
    """The base as it was in training, and its tokenizer."""
    config = described.model.model_copy(update={"trust_remote_code": trust_remote_code})
    tokenizer = models.load_tokenizer(config)
    return described.network(config, tokenizer), tokenizer


@dataclass(frozen=True)
class _Loaded:
    """A model that writes."""

    peft: Any

    @property
    def device(self) -> torch.device:
        return next(iter(self.peft.parameters())).device  # type: ignore[no-any-return]

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.peft.dtype)


def _written(model: Any, tokenizer: Any, asked: Sequence[Ids], how: GenerateConfig, seed: int) -> list[str]:
    torch.manual_seed(seed)
    answers = writing.write(_Loaded(model), asked, how, writing.Marks.of(model, tokenizer))
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
