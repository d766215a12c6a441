"""Models in llama.cpp's format (one file, quantised), as a Transformers folder: converted once, kept in the cache."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from fedlora.errors import ModelError, first_line, saving
from fedlora.files import home
from fedlora.files.atomic import new_folder

SUFFIX = ".gguf"
_FORMAT = 1
"""Of the folder that is made: another one is made anew."""
_INSTEAD = "another FEDLORA_HOME"


def converted(name: str, file: Path) -> Path:
    """The folder with a model's weights in bf16 (safetensors), its configuration and its tokenizer.

    Where it is not there yet, one process makes it and all others wait; the user is told, since it takes half a minute.

    Args:
        name: what the model is called.
        file: ending in `.gguf`.

    Raises:
        ModelError: the package `gguf` is missing, or the file is damaged.
        RunFolderError: the cache cannot be written.
    """
    content = json.dumps([_FORMAT, file.name, file.stat().st_size])
    folder = home.cache() / "models" / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None:
        raise ModelError(f"model.name={name} comes as {file.name}, which only gguf reads; install it: pip install gguf")
    with saving(folder, _INSTEAD):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                print(f"{name}: its weights are converted, once, into {folder} (half a minute)", file=sys.stderr)
                _convert(name, file, folder)
    return folder


def _convert(name: str, file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with redirect_stderr(io.StringIO()), new_folder(folder, _INSTEAD) as draft:  # its progress bars
        try:
            how = {"gguf_file": file.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
            model = AutoModelForCausalLM.from_pretrained(file.parent, **how).to(torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:
            raise ModelError(f"model.name={name}: {file} cannot be converted: {first_line(error)}") from error
        if hasattr(model.config, "quantization_config"):  # what is saved is quantised no longer
            del model.config.quantization_config
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
