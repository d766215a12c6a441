"""What a contestant says, in files of its folder; `contestants` reads them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .work import Score


class Said:
    """What a contestant leaves in its folder: when it had scored which round, the adapter after round one, versions."""

    def __init__(self, folder: Path, *packages: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        named = ("torch", "transformers", "peft", *packages)
        (folder / "packages.json").write_text(json.dumps({name: version(name) for name in named}))

    def scored(self, number: int, score: Score) -> None:
        said = {"round": number, "at": time.time(), "accuracy": score.hits / score.examples}
        with (self._folder / "scored.jsonl").open("a") as file:
            file.write(json.dumps(said) + "\n")

    def adapter(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """The global adapter after a round; the first alone is kept."""
        if number == 1:
            kept = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
            save_file(kept, self._folder / "round1.safetensors")
