"""The metrics of a round and their names, defined once: the loop, MLflow, the tables and the plots use these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # torch: who asks for a name need not wait for it
    from fedlora.adapter.divergence import Divergence
    from fedlora.objective import Score, Scores

GLOBAL, LOCAL, GAP = "global/", "local/", "gap/"
"""What the names of scores begin with: of the broadcast model on all test examples, means of the clients' own models on
their own, and the second minus the first."""
WORST, TENTH = "_worst", "_p10"
"""How the names of the worst client's local score and of the worst tenth's end."""
RHO_MODEL = "rho/model"
RHO_FLOOR = "rho/floor"
RHO_EXCESS = "rho/excess"
RHO_EFFECTIVE_CLIENTS = "rho/effective_clients"
ABO_R = "abo/R"
ABO_P = "abo/P"
ABO_Q = "abo/Q"
ABO_DISPERSION = "abo/dispersion"
PROBE_BEFORE = "ranks/before"
PROBE_ZERO_PADDING = "ranks/zero_padding"
PROBE_REPLICATION = "ranks/replication"
BYTES_TOTAL = "bytes/total"
CLIENTS_SELECTED = "clients/selected"
CLIENTS_COMPLETED = "clients/completed"
TIME_TRAIN = "time/train_s"
TIME_READ = "time/read_s"
TIME_AGGREGATE = "time/aggregate_s"
TIME_DIVERGENCE = "time/divergence_s"
TIME_EVALUATE = "time/evaluate_s"
TIME_ROUND = "time/round_s"
TIME_VIRTUAL = "time/virtual_s"
MEMORY_CLIENT = "memory/client_bytes"
MEMORY_SERVER = "memory/server_bytes"
TIME_RESUMED = "time/resumed"
"""1 in a round that an earlier process had begun; absent in the others."""

FINAL = "final/"
"""What the names of a run's results begin with."""
FINAL_GAP = f"{FINAL}gap"
FINAL_SECONDS = f"{FINAL}seconds"
_FINALS = {RHO_MODEL: f"{FINAL}rho", RHO_FLOOR: f"{FINAL}rho_floor", BYTES_TOTAL: f"{FINAL}bytes"}

PARTIAL = (TIME_TRAIN, TIME_ROUND)
"""What in a resumed round covers only what was done again; the server's seconds are kept with what they were spent on,
and a round is scored in one go."""
_COMPARED = (RHO_MODEL, RHO_FLOOR, RHO_EXCESS)

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Bytes:
    """What crossed the wire in a round, in bytes, serialised as sent; adapter, head and base update apart."""

    up_adapter: int = 0
    up_head: int = 0
    down_adapter: int = 0
    down_head: int = 0
    down_base: int = 0

    @property
    def total(self) -> int:
        return self.up_adapter + self.up_head + self.down_adapter + self.down_head + self.down_base


BYTES = {each.name: f"bytes/{each.name}" for each in fields(Bytes)}
"""Names of the round's bytes by kind."""


def of_global(scores: Scores) -> dict[str, float]:
    """Scores of the broadcast model on the full test set."""
    return {f"{GLOBAL}{name}": value for name, value in scores.values().items()}


def of_local(clients: Sequence[Scores], score: Score) -> dict[str, float]:
    """Mean, worst tenth (10th percentile where higher is better, else 90th) and worst of the clients' scores on their
    own test examples; nothing where none has been measured."""
    measured = (scores.values() for scores in clients if scores.examples)
    found = [values[score.name] for values in measured if score.name in values]
    if not found:
        return {}
    tenth, worst = (10, np.min) if score.higher_is_better else (90, np.max)
    name = f"{LOCAL}{score.name}"
    return {
        name: float(np.mean(found)),
        f"{name}{TENTH}": float(np.percentile(found, tenth)),
        f"{name}{WORST}": float(worst(found)),
    }


def gap(metrics: Metrics, score: Score) -> dict[str, float]:
    """Local minus global score, where both were measured."""
    of_clients, of_all = (metrics.get(f"{where}{score.name}") for where in (LOCAL, GLOBAL))
    return {} if of_clients is None or of_all is None else {f"{GAP}{score.name}": of_clients - of_all}


def of_divergence(divergence: Divergence) -> dict[str, float]:
    """ρ, floor, excess, effective clients and the two convergence conditions of the model."""
    return {
        RHO_MODEL: divergence.rho,
        RHO_FLOOR: divergence.floor,
        RHO_EXCESS: divergence.excess,
        RHO_EFFECTIVE_CLIENTS: divergence.effective_clients,
        ABO_R: divergence.R,
        ABO_P: divergence.P,
        ABO_Q: divergence.Q,
        ABO_DISPERSION: divergence.dispersion,
    }


def of_bytes(sent: Bytes, before: float) -> dict[str, float]:
    """Bytes of the round by kind, and of all rounds so far (`before` is the total up to the last round)."""
    return {metric: getattr(sent, name) for name, metric in BYTES.items()} | {BYTES_TOTAL: before + sent.total}


def reproducible(metrics: Metrics) -> dict[str, float]:
    """Those that the same run has again wherever it is repeated, to the bit: not what it took of time and memory."""
    taken = ("time/", "memory/")
    return {name: value for name, value in metrics.items() if name == TIME_VIRTUAL or not name.startswith(taken)}


def of_memory(clients: Sequence[int | None], server: int | None) -> dict[str, float]:
    """Peaks in bytes: the highest of the clients that completed, and the server's; what nobody measured is left out."""
    known = {MEMORY_CLIENT: max((each for each in clients if each), default=None), MEMORY_SERVER: server}
    return {name: float(value) for name, value in known.items() if value}


def of_participation(counts: Mapping[str, int]) -> dict[str, float]:
    """Clients selected and completed, and how many of the others crashed, came late or were rejected, … where any did.

    Args:
        counts: by what became of them; `completed` is one of them.
    """
    others = {f"clients/{status}": float(count) for status, count in counts.items() if status != "completed"}
    return {CLIENTS_SELECTED: sum(counts.values()), CLIENTS_COMPLETED: counts.get("completed", 0), **others}


def finals(last: Metrics, score: Score) -> dict[str, float]:
    """The last round's metrics that are repeated as a run's results, by their names there: every global score, the mean
    local one that decides and its gap, ρ, its floor, and the bytes."""
    names = {name: name.replace(GLOBAL, FINAL) for name in last if name.startswith(GLOBAL)}
    names |= {f"{LOCAL}{score.name}": f"{FINAL}local_{score.name}", f"{GAP}{score.name}": FINAL_GAP, **_FINALS}
    return {final: last[name] for name, final in names.items() if name in last}


@dataclass(frozen=True)
class RoundRecord:
    """A finished round: its number (0 is before training), when it ended (ms since 1970), clients and metrics.

    Where the update of one client was used there is no ρ: it is the mean, and its distance from itself says nothing.
    """

    round: int
    timestamp_ms: int
    clients: tuple[int, ...]
    metrics: Metrics

    def __post_init__(self) -> None:
        if self.metrics.get(CLIENTS_COMPLETED) == 1:  # also in runs of a version that wrote 0 there, as if exact
            known = {name: value for name, value in self.metrics.items() if name not in _COMPARED}
            object.__setattr__(self, "metrics", known)

    def to_json(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "timestamp_ms": self.timestamp_ms,
            "clients": list(self.clients),
            "metrics": dict(self.metrics),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RoundRecord:
        return cls(content["round"], content["timestamp_ms"], tuple(content["clients"]), content["metrics"])


def seconds(records: Sequence[RoundRecord]) -> float | None:
    """Wall time of a run's rounds of training; a resumed one counts as the mean of those that were trained in one go.

    What was scored before training is not counted: a run may have it from another that began alike, and strategies
    shall not differ by that. None where every round was resumed, or times are not known.
    """
    trained = [record for record in records if record.round]
    if not trained or any(TIME_ROUND not in record.metrics for record in trained):
        return None
    whole = [record.metrics[TIME_ROUND] for record in trained if not record.metrics.get(TIME_RESUMED)]
    if len(whole) == len(trained):
        return sum(whole)
    return sum(whole) * len(trained) / len(whole) if whole else None
