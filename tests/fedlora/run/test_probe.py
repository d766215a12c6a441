"""What padding does to a high-rank client in the first round with mixed ranks, against the same by hand."""

import numpy as np
import pytest
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.data import tokens
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import OBJECTIVE
from fedlora.run import rounds
from fedlora.run.runfolder import RunFolder

NAMES = ("ranks/before", "ranks/zero_padding", "ranks/replication")
LEARNING = {"training.local_steps": 12, "training.learning_rate": 0.02}
LISTED = {**LEARNING, "lora.ranks": [7, 3, 7]}
RULE = {**LEARNING, "lora.ranks": {"low": 2, "high": 6, "share": 0.3}, "rounds": 3}
RUNS = {
    "zero-padding": ({**LISTED, "strategy": "zero-padding"}, 1),
    "svd": ({**LISTED, "strategy": "svd"}, 1),
    "a changed base": ({**RULE, "strategy": "flora"}, 2),
    "a rule": ({**RULE, "strategy": "replication"}, 2),
    "a round without evaluation": ({**RULE, "strategy": "replication", "evaluation.every": 3}, 2),
    "uniform weights": ({**LISTED, "strategy": "replication", "weighting": "uniform"}, 1),
}
"""Settings, and the first round whose clients differ in rank."""


def measured(folder) -> list[dict]:
    return [dict(record.metrics) for record in rounds.records(RunFolder(folder))]


@pytest.mark.parametrize("case", RUNS)
def test_it_is_measured_once_in_the_first_mixed_round(finished, case):
    changes, number = RUNS[case]
    values = measured(finished(changes))
    assert [set(NAMES) & v.keys() for v in values] == [
        set(NAMES) if index == number else set() for index in range(len(values))
    ]


@pytest.mark.parametrize("changes", [{}, {"lora.ranks": [4, 4, 4]}])
def test_without_mixed_ranks_there_is_none(finished, changes):
    folder = finished(changes)
    assert not any(name.startswith("ranks/") for values in measured(folder) for name in values)
    assert not (folder / "probe.json").exists()


def padded(pair: Factors, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """B and A in float64, with zeros up to the rank."""
    B, A = np.zeros((pair.B.shape[0], rank)), np.zeros((rank, pair.A.shape[1]))
    B[:, : pair.rank], A[: pair.rank] = pair.B.numpy(), pair.A.numpy()
    return B, A


def mean(pairs: list[Factors], weights: np.ndarray, owners_only: bool) -> Factors:
    """The padded mean, each rank index over all clients or over those that hold it."""
    rank = max(pair.rank for pair in pairs)
    share = np.repeat(weights[:, None], rank, 1)  # clients × indices
    if owners_only:
        share = np.stack([w * (np.arange(rank) < pair.rank) for w, pair in zip(weights, pairs, strict=True)])
        share = share / share.sum(0)
    both = [padded(pair, rank) for pair in pairs]
    B = sum(s * B for s, (B, _) in zip(share, both, strict=True))
    A = sum(s[:, None] * A for s, (_, A) in zip(share, both, strict=True))
    return Factors(torch.from_numpy(B).float(), torch.from_numpy(A).float())


@pytest.mark.parametrize("case", RUNS)
def test_the_scores_are_those_by_hand(finished, case):
    changes, number = RUNS[case]
    run = RunFolder(finished(changes))
    setup, config = run.need_json("setup.json"), run.config
    data = tokens.open_tokens(run.path / setup["tokens"])
    uploads = [Adapter.from_tensors(run.read_tensors(run.client_stem(number, u))) for u in range(3)]
    examples = np.array([run.need_json(f"{run.client_stem(number, u)}.json")["examples"] for u in range(3)])
    weights = np.ones(3) / 3 if config.weighting == "uniform" else examples / examples.sum()
    high = max(range(3), key=lambda u: (uploads[u].rank, weights[u], -u))
    heads = {
        name: sum(w * u.head[name].double() for w, u in zip(weights, uploads, strict=True)).float()
        for name in uploads[0].head
    }
    model = ResidentModel.build(OBJECTIVE, config.model, config.lora, data.labels, 0, 99, torch.device("cpu"))
    model.set_base(run.read_state(number - 1).base, "what the clients trained on")
    adapters = {"ranks/before": uploads[high]}
    for name, owners_only in (("ranks/zero_padding", False), ("ranks/replication", True)):
        factors = {m: mean([u.factors[m] for u in uploads], weights, owners_only) for m in uploads[0].modules}
        adapters[name] = Adapter(factors, heads)
    found, test = measured(run.path)[number], tokens.examples(data.test, np.arange(len(data.test)))
    for name, adapter in adapters.items():
        model.load(adapter)
        assert found[name] == pytest.approx(OBJECTIVE.evaluate(model, test, 64, data.padding).accuracy, abs=1e-9), name
    assert len({found[name] for name in NAMES}) > 1
