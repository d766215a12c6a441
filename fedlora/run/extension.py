"""A finished run goes on to more rounds, in a folder of its own: what a run of so many rounds would have been."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig, configfile
from fedlora.config.run import NEUTRAL
from fedlora.errors import ConfigError, RunFolderError, counted, saving
from fedlora.run import rounds
from fedlora.run.runfolder import RunFolder

_TAKEN = ("setup.json", "partition.json", "partition.npz", "adapter_config.json", "cohort.json", "probe.json")
_ALLOWED = ("rounds", *NEUTRAL)


def extended(run: RunFolder, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration of a run that goes on.

    Args:
        run: a finished one.
        changes: by dotted key: `rounds`, and what changes no numbers.

    Raises:
        ConfigError: another setting is to change, or there are no more rounds than before.
        RunFolderError: the run is not finished, or the state of its last round is not whole.
    """
    before = run.config
    for key in changes:
        if key not in _ALLOWED and not key.startswith("tracking."):
            raise ConfigError(
                f"{key}={changes[key]!r} would make another run of it; only rounds, tracking.* and "
                f"{', '.join(NEUTRAL)} may change"
            )
    if before.training.final_learning_rate is not None:
        raise ConfigError(
            f"training.final_learning_rate={before.training.final_learning_rate:g}: the learning rate of every round "
            "depends on how many there are, so that a run of more rounds is another one from its first; start it anew"
        )
    flat = configfile.flatten(before.model_dump(mode="json"))
    config = configfile.build({**flat, **changes})
    if config.rounds <= before.rounds:
        raise ConfigError(f"rounds={config.rounds}, and the run in {run.path} has {before.rounds}; set rounds to more")
    if len(run.finished_rounds()) <= before.rounds:
        raise RunFolderError(
            f"{run.path} is not finished ({counted(len(run.finished_rounds()), 'round')} of {before.rounds + 1}, that "
            f"before training included); `fedlora resume {run.path}` first"
        )
    if run.read_record(run.state_stem(before.rounds)) is None:
        raise RunFolderError(f"{run.path}: the state after round {before.rounds} is missing or damaged; start anew")
    return config


def extend(run: RunFolder, config: RunConfig, path: Path) -> RunFolder:
    """A new folder that holds what a run has done so far; the run itself stays as it is.

    A last round that was scored because it was the last is open again, and is closed as one among others.

    Args:
        run: a finished one.
        config: as `extended`.
        path: of the new folder.

    Raises:
        RunFolderError: the folder is not empty, or cannot be written.
    """
    RunFolder.check(path, config)
    if RunFolder(path).holds_run():
        raise RunFolderError(f"{path} holds a run already; choose another --run-dir")
    with saving(path):
        for name in _TAKEN:
            if (run.path / name).is_file():
                path.mkdir(parents=True, exist_ok=True)
                shutil.copy2(run.path / name, path / name)
        shutil.copytree(run.path / "rounds", path / "rounds")
        if (run.path / "figures" / "partition.png").is_file():
            (path / "figures").mkdir()
            shutil.copy2(run.path / "figures" / "partition.png", path / "figures" / "partition.png")
        last = run.config.rounds
        if not rounds.scored_alike(run, config, last):
            (path / run.record_name(last)).unlink()
        return RunFolder.describe(path, config, run)  # last: without it the folder holds no run
