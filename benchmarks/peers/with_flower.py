"""Flower's simulation on Ray: two client actors of one core each, FedAvg as it comes.

    python -m peers.with_flower WORK OUT ROUNDS

Messages, sampling, sums and the server's loop are Flower's own; it has no local training of its own, so that clients
train with the plain loop of `work`, on a model that each actor keeps. The test set is scored where Flower's examples do
it, in the server's `evaluate_fn`, on both cores, which are idle then. `run_simulation` is used, the entry with an
in-memory link (Flower calls it deprecated): under `flwr run` the server would look for replies every three seconds.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from . import work as plain
from .said import Said

CORES = 2


def client_app(folder: Path) -> ClientApp:
    """Trains a client, and scores its model on its own test rows."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        work, client = plain.opened(folder), int(context.node_config["partition-id"])
        work.load(message.content["arrays"].to_torch_state_dict())
        work.train(int(message.content["config"]["server-round"]), client)
        score = work.score(work.own_batches(client))
        said = {"num-examples": work.examples[client], "loss": score.loss, "hits": score.hits}
        content = RecordDict({"arrays": ArrayRecord(work.read()), "metrics": MetricRecord(said)})
        return Message(content=content, reply_to=message)

    return app


def server_app(folder: Path, out: Path, rounds: int) -> ServerApp:
    """FedAvg over all clients, and the scores of what it comes to."""
    app, said = ServerApp(), Said(out, "flwr", "ray")

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        work, adapter = plain.opened(folder), arrays.to_torch_state_dict()
        torch.set_num_threads(CORES)
        work.load(adapter)
        if not number:
            for client in range(work.clients):
                work.score(work.own_batches(client))
        score = work.score(work.global_batches())
        said.adapter(number, adapter)
        said.scored(number, score)
        return MetricRecord({"accuracy": score.hits / score.examples, "loss": score.loss / score.examples})

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        work = plain.opened(folder)
        strategy = FedAvg(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=work.clients,
            min_available_nodes=work.clients,
        )
        strategy.start(grid, ArrayRecord(work.start), num_rounds=rounds, evaluate_fn=evaluate)

    return app


def main(folder: Path, out: Path, rounds: int) -> None:
    run_simulation(
        server_app(folder, out, rounds),
        client_app(folder),
        num_supernodes=plain.opened(folder).clients,
        backend_config={
            "init_args": {"num_cpus": CORES, "num_gpus": 0},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
