"""Adapters as PEFT folders: what `PeftModel.from_pretrained(base, folder)` loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedlora.adapter import Adapter
from fedlora.atomic import write_atomic
from fedlora.tensorfile import read_tensors, serialise

WEIGHTS, CONFIGURATION = "adapter_model.safetensors", "adapter_config.json"


def write_peft_folder(adapter: Adapter, folder: Path, peft_config: Mapping[str, object], card: str) -> None:
    """A folder that `PeftModel.from_pretrained(base, folder)` loads: configuration, weights, README card.

    Raises:
        RunFolderError: it cannot be written; what was there before is intact.
    """
    configuration = json.dumps(peft_config, indent=2, sort_keys=True) + "\n"
    write_atomic(folder / WEIGHTS, serialise(adapter.tensors(), {"format": "pt"}))
    write_atomic(folder / CONFIGURATION, configuration.encode())
    write_atomic(folder / "README.md", card.encode())


def read_peft_folder(folder: Path) -> Adapter:
    """The adapter in a PEFT folder.

    Raises:
        AdapterError: no `adapter_model.safetensors`, or not an adapter's content.
    """
    return Adapter.from_tensors(read_tensors(folder / WEIGHTS))
