"""A loop written by hand that holds everything in memory: no files, no tasks, no tracking.

    python -m peers.by_hand WORK OUT ROUNDS PROCESSES

Over two processes it is the limit of what two cores can do: each has a model and every second client, sums what its own
clients send, and scores every second batch of the test set. The other process is forked once the imports are done.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import torch
import transformers.models.bert.modeling_bert  # noqa: F401

from .said import Said
from .work import Score, Work

Tensors = dict[str, Any]


class Half:
    """What one of the processes does."""

    def __init__(self, folder: Path, part: int, of: int) -> None:
        self.work, self._part, self._of = Work(folder), part, of
        self._clients = range(part, self.work.clients, of)

    def begin(self) -> tuple[Score, Score]:
        """Scores before training: of all test rows, and of the clients'."""
        work = self.work
        work.load(work.start)
        return work.score(work.global_batches(self._part, self._of)), self._own()

    def _own(self) -> Score:
        return Score.total(self.work.score(self.work.own_batches(client)) for client in self._clients)

    def train(self, number: int, adapter: Tensors) -> Tensors:
        """The weighted sum of what this process's clients send, in float64."""
        work, total = self.work, sum(self.work.examples)
        start = {name: torch.as_tensor(tensor) for name, tensor in adapter.items()}
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in start.items()}
        for client in self._clients:
            work.load(start)
            work.train(number, client)
            work.score(work.own_batches(client))
            for name, handle in work.handles.items():
                sums[name].add_(handle.detach(), alpha=work.examples[client] / total)
        return {name: tensor.numpy() for name, tensor in sums.items()}  # a tensor would travel as an open file

    def score(self, adapter: Tensors) -> Score:
        self.work.load({name: torch.as_tensor(tensor) for name, tensor in adapter.items()})
        return self.work.score(self.work.global_batches(self._part, self._of))


def serve(pipe: Any, folder: Path, part: int, of: int) -> None:
    """A process that does its half until the other goes."""
    half = Half(folder, part, of)
    while (asked := pipe.recv()) is not None:
        job, *given = asked
        pipe.send(getattr(half, job)(*given))


class Halves:
    """This process's half, and those of others, done side by side."""

    def __init__(self, folder: Path, processes: int) -> None:
        self._pipes = []
        for part in range(1, processes):
            mine, theirs = multiprocessing.Pipe()
            context = multiprocessing.get_context("fork")
            context.Process(target=serve, args=(theirs, folder, part, processes), daemon=True).start()
            self._pipes.append(mine)
        self._own = Half(folder, 0, processes)
        self.start = {name: tensor.numpy() for name, tensor in self._own.work.start.items()}

    def do(self, job: str, *given: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((job, *given))
        return [getattr(self._own, job)(*given), *(pipe.recv() for pipe in self._pipes)]

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)


def main(folder: Path, out: Path, rounds: int, processes: int) -> None:
    torch.set_num_threads(1)
    said, halves = Said(out), Halves(folder, processes)
    adapter = halves.start
    said.scored(0, Score.total(whole for whole, _ in halves.do("begin")))
    for number in range(1, rounds + 1):
        sums = halves.do("train", number, adapter)
        adapter = {name: sum(each[name] for each in sums).astype("float32") for name in sums[0]}
        said.adapter(number, {name: torch.from_numpy(tensor) for name, tensor in adapter.items()})
        said.scored(number, Score.total(halves.do("score", adapter)))
    halves.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
