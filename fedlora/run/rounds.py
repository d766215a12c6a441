"""What the rounds of a run are: which are done, whose rows a client has, and what is scored after one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedlora import seeds
from fedlora.config import RunConfig, TrainingConfig
from fedlora.data.batches import steps_for
from fedlora.data.partition import Partition
from fedlora.data.partitioners import Rows
from fedlora.metrics import RoundRecord
from fedlora.run import probe
from fedlora.run.records import Part, Setup
from fedlora.run.runfolder import RunFolder
from fedlora.strategies.base import Strategy

_LARGEST_PART = 1000
"""Test examples per evaluation part; fixed, so that scores do not depend on the number of workers."""


def unfinished(run: RunFolder) -> list[int]:
    """The rounds still to do, from 0, the evaluation before training."""
    return list(range(len(run.finished_rounds()), run.config.rounds + 1))


def begun(run: RunFolder, number: int) -> bool:
    """Whether something of a round's training is there already. Round 0 only scores, and is scored anew."""
    folder = run.round_folder(number)
    return number > 0 and folder.is_dir() and any(folder.iterdir())


@dataclass(frozen=True)
class Examples:
    """The rows that a client trains and is tested on, and how many clients' data that is, with their sizes."""

    train: Rows
    test: Rows
    sizes: tuple[int, ...]

    def training(self, training: TrainingConfig) -> TrainingConfig:
        """How it trains: on everybody's data, as many steps as one client takes on average."""
        if len(self.sizes) == 1 or training.local_epochs is None:
            return training
        each = [steps_for(size, training.step_size, None, training.local_epochs) for size in self.sizes]
        return training.model_copy(update={"local_steps": round(sum(each) / len(each)), "local_epochs": None})


def examples_of(strategy: Strategy, partition: Partition, client: int) -> Examples:
    """A client's own rows, or everybody's where the strategy pools the data."""
    if not strategy.traits.pools_data:
        return Examples(partition.train[client], partition.test[client], (len(partition.train[client]),))
    train, test = (np.unique(np.concatenate(parts)) for parts in (partition.train, partition.test))
    return Examples(train, test, partition.sizes)


def evaluation_parts(run: RunFolder, number: int) -> list[Part]:
    """What must be scored after round `number`: the test set in fixed parts, and before training each client's own.

    A personal strategy has no global model: the test examples are dealt out evenly, and each is judged by one client's
    model, an unbiased estimate of the clients' mean accuracy at the price of one pass (our reading).
    """
    config, parts = run.config, probe.parts(run, number)
    examples = Setup.read(run).examples["test"]
    how = config.evaluation.generate
    if answered(run, number):
        parts = _dealt(run, "answers", min(how.examples, examples), how.batch_size) + parts
    if _scored(config, number):
        local = range(config.clients if number == 0 and config.evaluation.local else 0)
        whole = _dealt(run, "global", examples, _LARGEST_PART)
        parts = [*whole, *(Part("local", client) for client in local), *parts]
    return parts


def _dealt(run: RunFolder, split: Literal["global", "answers"], examples: int, largest: int) -> list[Part]:
    personal = run.strategy.traits.personal
    step = run.config.clients if personal else math.ceil(examples / largest)
    return [Part(split, index if personal else None, index, step) for index in range(min(step, examples))]


def _scored(config: RunConfig, number: int) -> bool:
    return number in (0, config.rounds) or number % config.evaluation.every == 0


def answered(run: RunFolder, number: int) -> bool:
    """Whether test examples are answered in writing after round `number`."""
    return _answered(run, run.config, number)


def _answered(run: RunFolder, config: RunConfig, number: int) -> bool:
    if not config.evaluation.generate.scorers:
        return False
    return number in (0, config.rounds) or number % answers_every(config, Setup.read(run).examples["train"]) == 0


def scored_alike(run: RunFolder, config: RunConfig, number: int) -> bool:
    """Whether round `number` is scored in the same way by another configuration that differs in its rounds alone."""
    same = _scored(run.config, number) == _scored(config, number)
    return same and _answered(run, run.config, number) == _answered(run, config, number)


def answers_every(config: RunConfig, examples: int) -> int:
    """Every how many rounds: as configured, else as often as writing takes no more than its share of the work.

    Counted in tokens of `data.max_length`, each trained: one that is written costs about as much as one that is trained
    (memory and arithmetic of one row against those of a batch), one that is read before a third.

    Args:
        config: of the run.
        examples: of all clients, to train on.
    """
    how, training = config.evaluation.generate, config.training
    if how.every is not None:
        return how.every
    each = steps_for(
        max(1, examples // config.clients), training.step_size, training.local_steps, training.local_epochs
    )
    trained = config.clients_per_round * each * training.step_size * config.data.max_length
    answers = how.examples + config.clients_per_round * how.local_examples
    written = answers * (config.data.max_length / 3 + how.max_new_tokens)
    return max(1, math.ceil(written * (1 - how.share) / (how.share * trained)))


def answered_rows(run: RunFolder) -> Rows:
    """The test examples that are answered, in the order in which they are drawn: those that are shown come first."""
    examples, how = Setup.read(run).examples["test"], run.config.evaluation.generate
    return seeds.numpy_generator(run.config.seed, "answers").permutation(examples)[: how.examples]


def read_record(run: RunFolder, number: int) -> RoundRecord | None:
    """The record of a finished round."""
    content = run.read_json(run.record_name(number))
    return RoundRecord.from_json(content) if content else None


def records(run: RunFolder) -> list[RoundRecord]:
    """The records of all finished rounds, in order."""
    return [RoundRecord.from_json(content) for content in run.closed()]
