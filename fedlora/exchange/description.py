"""What a folder says of the model that its adapter is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fedlora import objective
from fedlora.config import ModelConfig
from fedlora.data.turns import OURS
from fedlora.errors import AdapterError, ConfigError, ModelError, first_line
from fedlora.exchange.peftfolder import DESCRIPTION
from fedlora.files.limits import clean, file_within, read_json
from fedlora.model import base as models
from fedlora.objective import Objective


class Description(NamedTuple):
    """What `fedlora.json` beside an adapter says."""

    model: ModelConfig
    """The base model."""
    content: dict[str, Any]
    """All of it, as it stands there."""

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return list(self.content["labels"])

    @property
    def writes(self) -> bool:
        """Whether it answers in writing."""
        return _objective(self.content).writes

    def network(self, config: ModelConfig, tokenizer: Any) -> Any:
        """The base as it was in training.

        Raises:
            ModelError: it cannot be loaded.
        """
        return _objective(self.content).load(config, self.labels, tokenizer.pad_token_id, 0)


def description(path: Path) -> Description:
    """What `fedlora.json` beside an adapter says.

    Raises:
        AdapterError: it is not there or not readable.
    """
    try:
        content = read_json(file_within(path, DESCRIPTION))
        return Description(_described(content), content)
    except (OSError, ValueError) as error:
        if clients := sorted(path.glob("client-*")):
            raise AdapterError(
                f"{path} holds an adapter per client and no global one; choose one, such as {clients[0]}"
            ) from None
        reason = clean(getattr(error, "strerror", None) or first_line(error))
        raise AdapterError(
            f"{path} holds no readable {DESCRIPTION} ({reason}); for adapters from elsewhere use "
            "PeftModel.from_pretrained(base, folder) with your own base"
        ) from None


def _objective(content: dict[str, Any]) -> Objective:
    """What the adapter was trained for; earlier versions did not say, and knew one thing."""
    try:
        return objective.find(str(content.get("task", "classification")))
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _described(content: Any) -> ModelConfig:
    """The base model of a description whose other values are what they should be, too."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("it does not say which model the adapter is for")
    labels = content.get("labels")
    lacking = _objective(content).labelled and not labels
    if not isinstance(labels, list) or lacking or not all(isinstance(label, str) for label in labels):
        raise ValueError("its labels are not a list of names")
    if content.get("chat_template", "auto") not in ("auto", *OURS):
        raise ValueError("it names a chat template that is none of ours")
    # Whoever wrote the folder is not who may allow a model's code to run.
    return ModelConfig.model_validate({**content["model"], "trust_remote_code": False})


def from_pretrained(kind: Any, name: str) -> Any:
    """A Transformers model of a class, from safetensors only.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        return kind.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"base model '{name}' cannot be loaded: {first_line(error)}") from error


def tokenizer_if_any(name: str) -> Any:
    """The tokenizer beside a model, or None."""
    try:
        return models.load_tokenizer(ModelConfig(name=name))
    except ModelError:
        return None
