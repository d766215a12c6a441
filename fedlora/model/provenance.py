"""Which base model a run stands on, exactly: the commit of a hub id, or a digest of the files of a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from fedlora.config import ModelConfig
from fedlora.errors import ModelError
from fedlora.files import digests
from fedlora.model.base import model_file
from fedlora.model.known import resolve

Origin = dict[str, str]
"""`name`, and `digest` of a folder or `revision` (the commit) of a hub id."""

_READ = (".safetensors", ".json", ".txt", ".model", ".jinja", ".py")
"""Files that what is loaded may depend on; READMEs and weights in other formats are never read."""


def of_model(config: ModelConfig) -> Origin:
    """Where the model that a configuration names comes from, as it is now.

    A folder's digest is that of its weights, configuration, tokenizer and code; one of a file is looked up where its
    size and time of change are known.

    Raises:
        ModelError: there is no such model, or it cannot be reached.
    """
    location = resolve(config.name)
    if Path(location).is_dir():
        return {"name": config.name, "digest": _folder_digest(Path(location))}
    return {"name": config.name, "hub": location, "revision": _commit(config, location)}


def pinned(config: ModelConfig, origin: Mapping[str, str] | None) -> ModelConfig:
    """The configuration at the commit that the run began with: a branch may have moved on since."""
    return config.model_copy(update={"revision": origin["revision"]}) if origin and "revision" in origin else config


def check(config: ModelConfig, origin: Mapping[str, str] | None) -> None:
    """Refuse to continue a run on a model that is no longer what it was when the run began.

    Raises:
        ModelError: the folder's files changed, or the name means something else here.
    """
    if not origin:  # a run from before this was recorded
        return
    now = of_model(pinned(config, origin))
    then_, now_ = (each.get("digest") or f"commit {each['revision']}" for each in (origin, now))
    if then_ != now_:
        raise ModelError(
            f"model.name={config.name} is no longer what the run began with ({then_[:23]}, now {now_[:23]}); restore "
            "its files, or begin again with another --run-dir"
        )


def remote_code_notice(config: ModelConfig) -> str:
    """What a run says where it may execute a model's own code; empty where it may not."""
    if not config.trust_remote_code:
        return ""
    at = f" at {config.revision}" if config.revision else ""
    return f"warning: model.trust_remote_code is set: Python files that come with {config.name}{at} may be executed"


def tags(origin: Mapping[str, str] | None) -> dict[str, str]:
    """`model.digest` or `model.revision`, as MLflow shows it."""
    return {f"model.{key}": origin[key] for key in ("digest", "revision") if origin and key in origin}


def _commit(config: ModelConfig, location: str) -> str:
    from transformers.utils.hub import extract_commit_hash

    found = model_file(location, "config.json", config.revision)
    commit = extract_commit_hash(found, None) if found else None
    if commit is None:
        raise ModelError(
            f"model.name={config.name}: {location} cannot be reached on the Hugging Face hub, nor is it in the cache; "
            "expected a packaged name, a folder, or a reachable Hugging Face id"
        )
    return str(commit)


def parts_of(folder: Path) -> dict[str, str]:
    """The files of a model's folder that what is loaded may depend on, by their path in it, with their SHA-256."""
    files = [path for path in folder.rglob("*") if path.suffix in _READ and _is_part(path.relative_to(folder))]
    return {path.relative_to(folder).as_posix(): digests.of_lasting_file(path) for path in files if path.is_file()}


def _folder_digest(folder: Path) -> str:
    return hashlib.sha256(json.dumps(parts_of(folder), sort_keys=True).encode()).hexdigest()


def _is_part(inside: Path) -> bool:
    """Of the model itself: files beside each other and one folder down (`1_Pooling/config.json`)."""
    return len(inside.parts) <= 2 and not inside.parts[0].startswith((".", "__"))
