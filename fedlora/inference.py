"""Using a trained adapter: the base model as it was in training, with the adapter on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlora import model as models
from fedlora.config import ModelConfig
from fedlora.errors import AdapterError, ModelError, first_line
from fedlora.peftfolder import DESCRIPTION


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


def load_adapter(folder: str | Path) -> tuple[Any, Any, list[str]]:
    """The model with the adapter in `folder` on it, its tokenizer and the names of its labels, ready for inference.

    Raises:
        AdapterError: the folder was not written by fedlora.
        ModelError: the base model cannot be loaded.
    """
    from peft import PeftModel

    from fedlora.merging import apply_base_update

    path = Path(folder)
    config, content = description(path)
    tokenizer = models.load_tokenizer(config)
    base: Any = models.load_base(config, content["labels"], tokenizer.pad_token_id)
    apply_base_update(base, path)
    return PeftModel.from_pretrained(base, str(path)).eval(), tokenizer, content["labels"]


def description(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """What `fedlora.json` beside an adapter says: the base model's configuration, and everything (`labels`, …).

    Raises:
        AdapterError: it is not there or not readable.
    """
    try:
        content = json.loads((path / DESCRIPTION).read_text())
        return ModelConfig.model_validate(content["model"]), content
    except (OSError, ValueError, KeyError) as error:
        if clients := sorted(path.glob("client-*")):
            raise AdapterError(
                f"{path} holds an adapter per client and no global one; choose one, such as {clients[0]}"
            ) from None
        raise AdapterError(
            f"{path} holds no readable {DESCRIPTION} ({error}); for adapters from elsewhere use "
            "PeftModel.from_pretrained(base, folder) with your own base"
        ) from None


def from_pretrained(kind: Any, name: str) -> Any:
    """A Transformers model of a class, from safetensors only.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        return kind.from_pretrained(name, use_safetensors=True)
    except Exception as error:
        raise ModelError(f"base model '{name}' cannot be loaded: {first_line(error)}") from error


def tokenizer_if_any(name: str) -> Any:
    """The tokenizer beside a model, or None."""
    try:
        return models.load_tokenizer(ModelConfig(name=name))
    except ModelError:
        return None
