"""What the rounds of a run are: which are done, whose rows a client has, and what is scored after one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedlora.config import TrainingConfig
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
        each = [steps_for(size, training.batch_size, None, training.local_epochs) for size in self.sizes]
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
    config = run.config
    if number not in (0, config.rounds) and number % config.evaluation.every:
        return probe.parts(run, number)
    personal = run.strategy.traits.personal
    examples = Setup.read(run).examples["test"]
    step = config.clients if personal else math.ceil(examples / _LARGEST_PART)
    parts = [Part("global", index if personal else None, index, step) for index in range(min(step, examples))]
    if number == 0 and config.evaluation.local:
        parts += [Part("local", client) for client in range(config.clients)]
    return parts + probe.parts(run, number)


def read_record(run: RunFolder, number: int) -> RoundRecord | None:
    """The record of a finished round."""
    content = run.read_json(run.record_name(number))
    return RoundRecord.from_json(content) if content else None


def records(run: RunFolder) -> list[RoundRecord]:
    """The records of all finished rounds, in order."""
    return [RoundRecord.from_json(content) for content in run.closed()]
