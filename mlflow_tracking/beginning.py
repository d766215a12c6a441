"""A run that starts from a registered adapter."""

from __future__ import annotations

import hashlib
import shutil
import tempfile

from fedlora.config import RunConfig
from fedlora.config.lora import REGISTRY
from fedlora.errors import ConfigError
from fedlora.files import home
from mlflow_tracking import champion


def looked_up(config: RunConfig) -> RunConfig:
    """A configuration that starts from a registered adapter (`lora.init=models:/NAME@ALIAS`), with the folder of a
    copy of it, one for each version: the run goes by that, wherever the alias moves.

    Raises:
        ConfigError: the name is of another form.
        TrackingError: as `download`.
    """
    name = config.lora.init or ""
    if not name.startswith(REGISTRY):
        return config
    model, at, alias = name.removeprefix(REGISTRY).partition("@")
    if not (model and at and alias):
        raise ConfigError(f"lora.init={name}: expected models:/NAME@ALIAS, such as models:/fedlora-demo@champion")
    place = home.cache() / "adapters"
    with tempfile.TemporaryDirectory(prefix="fedlora-") as folder:
        found = champion.download(model, folder, alias, config.tracking.uri)
        tensors = b"".join(file.read_bytes() for file in sorted(found.rglob("*.safetensors")))
        copy = place / f"{model}-{hashlib.sha256(tensors).hexdigest()[:12]}"
        if not copy.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            shutil.copytree(found, copy)
    return config.model_copy(update={"lora": config.lora.model_copy(update={"init": str(copy)})})
