"""pfl-research (arXiv 2404.06430), two processes under torchrun, as its documentation says.

    torchrun --standalone --nproc_per_node=2 -m peers.with_pfl WORK OUT ROUNDS

Local training, weights, sums over processes and the server's step are pfl's own. Three things hang in its extension
points: a dataset whose batches are those of the work, a schedule that steps with the local optimiser, and an algorithm
and a callback that score what the others score (pfl would score training rows, and the global model from the second
round on).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("PFL_PYTORCH_DEVICE", "cpu")

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import all_reduce_metrics
from pfl.internal.ops.pytorch_ops import distributed
from pfl.metrics import Metrics, StringMetricName, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from .said import Said
from .work import Rows, Score, Work


class Network(nn.Module):
    """The model as pfl wants it: with its loss and its metrics."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work, self.model = work, work.model

    def loss(self, **batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.work.logits(batch), batch["labels"])

    @torch.inference_mode()
    def metrics(self, **batch: Tensor) -> dict[str, Weighted]:
        self.eval()
        loss, hits, examples = self.work.score_batch(batch)
        return {"loss": Weighted(loss, examples), "accuracy": Weighted(hits, examples)}


class Batches(Dataset):
    """Exactly these batches, whatever size is asked for."""

    def __init__(self, work: Work, split: str, batches: list[Rows], examples: int, client: int | None = None) -> None:
        super().__init__((), user_id=None if client is None else str(client))
        self._work, self._split, self._batches, self._examples = work, split, batches, examples

    def __len__(self) -> int:
        return self._examples

    def iter(self, batch_size: int | None) -> Iterator[dict[str, Tensor]]:
        return (self._work.batch(self._split, rows) for rows in self._batches)


class FedIT(FederatedAveraging):
    """Federated averaging whose clients have batches of their own in each round, and score their own test rows."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def simulate_one_user(self, model: Any, user_dataset: Any, central_context: Any) -> Any:
        return super().simulate_one_user(model, user_dataset, replace(central_context, do_evaluation=False))

    def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
        work, client, number = self._work, int(user_dataset.user_id), central_context.current_central_iteration + 1
        work.seed_dropout(number, client)
        model.pytorch_model.train()
        batches = Batches(work, "train", work.batches(number, client), len(user_dataset), client)
        update, metrics = super().train_one_user(initial_model_state, model, batches, central_context)
        own = work.own_batches(client)
        return update, metrics | evaluated(model, work, own, "own") if own else metrics


class Scoring(TrainingProcessCallback):
    """Scores all test rows before and after every round, each process its part; before training each client's too."""

    def __init__(self, work: Work, said: Said | None) -> None:
        self._work, self._said = work, said
        self._mine = work.global_batches(distributed.global_rank, distributed.world_size)

    def on_train_begin(self, *, model: Any) -> Metrics:
        mine = range(distributed.global_rank, self._work.clients, distributed.world_size)
        own = [rows for client in mine for rows in self._work.own_batches(client)]
        evaluated(model, self._work, own, "own")
        self._scored(model, 0)
        return Metrics()  # pfl reports them with round one's, and refuses two of a name

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        if self._said:
            self._said.adapter(central_iteration + 1, self._work.read())
        return False, self._scored(model, central_iteration + 1)

    def _scored(self, model: Any, number: int) -> Metrics:
        metrics = all_reduce_metrics(evaluated(model, self._work, self._mine, "all"))
        loss, accuracy = (metrics[StringMetricName(f"all | {name}")] for name in ("loss", "accuracy"))
        if self._said:
            self._said.scored(number, Score(loss.weighted_value, int(accuracy.weighted_value), int(accuracy.weight)))
        return metrics


def evaluated(model: Any, work: Work, batches: list[Rows], name: str) -> Metrics:
    """What pfl's own evaluation says of the model as it is, on these batches."""
    rows = Batches(work, "test", batches, sum(map(len, batches)))
    found: Metrics = model.evaluate(rows, lambda metric: StringMetricName(f"{name} | {metric}"), NNEvalHyperParams(64))
    return found


def main(folder: Path, out: Path, rounds: int) -> None:
    work = Work(folder)
    work.load(work.start)
    network, settings = Network(work), work.settings

    def local_optimiser(parameters: Any, lr: float) -> torch.optim.Optimizer:
        optimiser, schedule = work.optimiser([each for each in parameters if each.requires_grad])
        optimiser.register_step_post_hook(lambda *_: schedule.step())
        return optimiser

    model = PyTorchModel(network, local_optimiser, torch.optim.SGD(list(work.handles.values()), lr=1.0))
    clients = list(range(work.clients))
    data = FederatedDataset(
        lambda client: Batches(work, "train", [], work.examples[client], client),
        get_user_sampler("minimize_reuse", clients),
    )
    training = NNTrainHyperParams(
        local_batch_size=None,
        local_num_epochs=1,
        local_learning_rate=settings["learning_rate"],
        local_max_grad_norm=settings["max_grad_norm"],
    )
    FedIT(work).run(
        NNAlgorithmParams(rounds, evaluation_frequency=1, train_cohort_size=work.clients, val_cohort_size=0),
        SimulatedBackend(data, data, [WeightByDatapoints()]),
        model,
        training,
        callbacks=[Scoring(work, Said(out, "pfl") if distributed.global_rank == 0 else None)],
    )
    torch.distributed.barrier()  # a process that ends while the other still speaks to it would be aborted
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
