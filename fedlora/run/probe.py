"""What aggregation does to a high-rank client in the first round with mixed ranks (arXiv 2406.17477).

Its accuracy on the full test set before, after zero-padding, and after replication of the same uploads, whatever the
strategy of the run.
"""

from __future__ import annotations

from fedlora import metrics
from fedlora.adapter.updates import Updates
from fedlora.run.records import Part
from fedlora.run.runfolder import RunFolder
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.step import advance

_FILE = "probe.json"
_PADDINGS = {"zero-padding": metrics.PROBE_ZERO_PADDING, "replication": metrics.PROBE_REPLICATION}


def prepare(run: RunFolder, number: int, state: ServerState, updates: Updates) -> None:
    """In the first round whose uploads differ in rank, save both paddings' adapters for the largest client of the
    highest rank; in other rounds do nothing."""
    known = run.read_json(_FILE)
    uploaded = [adapter.rank for adapter in updates.adapters]
    if len(set(uploaded)) == 1 or (known and known["round"] != number):
        return
    highest = [position for position, rank in enumerate(uploaded) if rank == max(uploaded)]
    client = updates.clients[max(highest, key=lambda position: float(updates.weights[position]))]
    for name in _PADDINGS:
        strategy = registry.make(name)
        adapter = strategy.broadcast(advance(strategy, state, updates), client)
        run.write_tensors(_stem(run, number, name), adapter.tensors(), {"round": number, "client": client})
    run.write_json(_FILE, {"round": number, "client": client})


def parts(run: RunFolder, number: int) -> list[Part]:
    """What must be scored for it after round `number`."""
    known = run.read_json(_FILE)
    if not known or known["round"] != number:
        return []
    client = known["client"]
    before = Part("probe", client, stem=run.client_stem(number, client), metric=metrics.PROBE_BEFORE)
    after = [Part("probe", client, stem=_stem(run, number, name), metric=metric) for name, metric in _PADDINGS.items()]
    return [before, *after]


def _stem(run: RunFolder, number: int, name: str) -> str:
    return f"{run.state_stem(number)}-{name}"
