"""What can be known to be wrong before a run, its folder, a server or a worker exists.

Nothing is started, written (but for the cache) or downloaded, and no weights are read: the data's labels and owners are
looked at and dealt as the run will deal them, and the model is built from its configuration on the `meta` device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config import DataConfig, PartitionConfig, RunConfig
from fedlora.data import catalogue
from fedlora.errors import ConfigError, StrategyRefusal, counted, remembered
from fedlora.files import limits
from fedlora.files.limits import FileStates
from fedlora.strategies import registry

if TYPE_CHECKING:
    from fedlora.data.survey import Survey
    from fedlora.model.outline import Layer


@dataclass(frozen=True)
class Dealt:
    """A run's data, in numbers."""

    labels: int
    train: int
    test: int
    smallest: int
    """Training examples of the client that has fewest."""
    largest: int


@dataclass(frozen=True)
class Found:
    """What a check has found: a run that can begin."""

    config: RunConfig
    dealt: Dealt | None
    """None where the data is on the hub, or large: the run itself will tell."""
    layers: tuple[Layer, ...] | None
    """What the adapter is put on; None where only loading the model would tell."""

    def line(self) -> str:
        """The run in one line."""
        return f"{self.config.strategy} on {self.config.data.name}, {self._of_data()}; {self._of_model()}"

    def _of_data(self) -> str:
        clients = f"{counted(self.config.clients, 'client')}"
        if self.dealt is None:
            return f"{clients} (the data was not looked at: it is on the hub, or large)"
        found = self.dealt
        each = str(found.smallest) if found.smallest == found.largest else f"{found.smallest} to {found.largest}"
        labels = f"{found.labels} labels, " if found.labels > 1 else ""  # one is the group of examples without any
        return f"{labels}{found.train} + {found.test} examples, {clients} with {each}"

    def _of_model(self) -> str:
        name, rank = self.config.model.name, self.config.lora.highest_rank
        if self.layers is None:
            return f"{name}, rank {rank} (the model was not looked at: it is on the hub, or runs its own code)"
        endings = sorted({layer.name.rsplit(".", 1)[-1] for layer in self.layers})
        return f"{name}, rank {rank} on {len(self.layers)} modules ({', '.join(endings)})"


def check(config: RunConfig) -> Found:
    """Refuse a run that cannot work, as far as that can be known now. A second look at the same data, partition or
    model costs next to nothing.

    Raises:
        ConfigError, DataError, ModelError: one line that names the key, the value and what to do.
    """
    names(config)
    layers = _layers(config)
    data = config.data.model_copy(update={"max_length": DataConfig().max_length})  # which is no matter of the rows
    return Found(config, _dealt(config.task, data, config.partition, config.clients, config.seed, _files(data)), layers)


def names(config: RunConfig) -> None:
    """Resolve every name in a configuration: task, strategy, data, model, device. Looks into no file.

    Raises:
        ConfigError, DataError, ModelError: one line that names the key, the value and what to do.
    """
    catalogue.check(config.data)
    catalogue.check_owners(config.data, config.partition.name)
    check_rank(config)
    from fedlora import objective  # torch, which a mistake in the lines above need not wait for
    from fedlora.model import arithmetic
    from fedlora.model.known import resolve
    from fedlora.run import warmstart
    from fedlora.training import engines, workers

    engines.check(config.runner)
    found = objective.find(config.task)
    if (scorers := config.evaluation.generate.scorers) and not found.writes:
        raise ConfigError(
            f"evaluation.generate.scorers={','.join(scorers)} judge what is written, and task={config.task} writes "
            "nothing; leave them out, or set task=generation"
        )
    found.check(config)
    warmstart.check(config)
    resolve(config.model.name)
    arithmetic.check(config.model, workers.slot_devices(config.runner))


def check_rank(config: RunConfig) -> None:
    """Ask the strategy whether it can have the rank.

    Raises:
        StrategyRefusal: it cannot.
    """
    rank = config.lora.highest_rank
    if reason := registry.make(config.strategy, config.strategy_options).refuses_rank(rank):
        raise StrategyRefusal(f"strategy={config.strategy} does not go with lora.rank={rank}: {reason}")


def before_run(config: RunConfig, folder: Path) -> Found | None:
    """The check of a run that is to begin in a folder; of one that is continued there the data may be gone by now, and
    only the folder is looked at (None).

    Raises:
        ConfigError, DataError, ModelError: as `check`.
        RunFolderError: as `RunFolder.create`.
    """
    from fedlora.run.runfolder import RunFolder

    RunFolder.check(folder, config)
    return None if (folder / "partition.json").is_file() else check(config)


def _files(data: DataConfig) -> FileStates:
    root = catalogue.resolve(data).path
    if root is None:
        return ()
    return limits.states(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else limits.states([root])


@remembered(4096)
def _dealt(
    task: str, data: DataConfig, partition: PartitionConfig, clients: int, seed: int, files: FileStates
) -> Dealt | None:
    """The data, dealt as the run will deal it; None where it cannot be looked at."""
    from fedlora.data.partition import Split
    from fedlora.data.partition import partition as deal

    seen = _surveyed(task, data, partition.by, seed, files)
    if seen is None:
        return None
    train, test = Split(seen.train, seen.train_clients), Split(seen.test, seen.test_clients)
    sizes = deal(partition, clients, seed, train, test, seen.labels, "").sizes
    return Dealt(len(seen.labels), len(seen.train), len(seen.test), min(sizes), max(sizes))


@remembered(4)
def _surveyed(task: str, data: DataConfig, by: str | None, seed: int, files: FileStates) -> Survey | None:
    from fedlora import objective
    from fedlora.data.survey import survey

    found = objective.find(task)
    return survey(data, lambda light: found.draft(data, by, seed, light))


def _layers(config: RunConfig) -> tuple[Layer, ...] | None:
    """What the adapter is put on, after a look at whether it, the texts and the tokenizer fit the model."""
    from fedlora import objective
    from fedlora.model import arithmetic, outline, targets
    from fedlora.model import base as model
    from fedlora.training import workers

    found = outline.of(config.model, objective.find(config.task))
    if found is None:
        return None
    written = config.evaluation.generate.max_new_tokens if config.evaluation.generate.scorers else 0
    model.check_positions(config.model, found.positions, config.data.max_length, written)
    found.check_vocabulary(config.model.name)
    if config.model.gradient_checkpointing and not found.checkpoints:
        raise arithmetic.cannot_keep_less(config.model.name)
    packed = {layer.name: layer.d_in for layer in found.layers if layer.ordinary}
    for device in workers.slot_devices(config.runner):
        arithmetic.check_unpacking(config.model, device, packed)
    layers = found.targets(config.lora)
    strategy = registry.find(config.strategy)
    for layer in layers:
        targets.check_sides(config.lora, layer.name, (layer.d_out, layer.d_in))
        if strategy.traits.trains_core and not layer.linear:
            raise targets.no_place_for_core(layer.name)
        if strategy.traits.changes_base and layer.tied:
            raise targets.would_change_both(layer.name, layer.tied)
    return layers
