"""Using a trained adapter: the base model as it was in training, with the adapter on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlora.config import ModelConfig
from fedlora.exchange.description import description
from fedlora.exchange.merging import apply_base_update, attach
from fedlora.model import base as models


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
    config = described.model.model_copy(update={"trust_remote_code": trust_remote_code})
    tokenizer = models.load_tokenizer(config)
    base = described.network(config, tokenizer)
    return apply_base_update(attach(base, path), path).eval(), tokenizer, described.labels
