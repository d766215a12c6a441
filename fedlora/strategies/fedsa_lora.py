"""FedSA-LoRA: A is shared, every client keeps its own B."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlora.adapter import Adapter, Factors, Part
from fedlora.adapter.updates import Updates
from fedlora.sections import Section
from fedlora.strategies.base import Family, Plan, ServerState, Strategy, Traits


class FedSALoRA(Strategy):
    """`Ā = Σ w_u A_u` for all; client u goes on with its own `B_u`. arXiv 2410.01463.

    A client that has not taken part yet starts from B = 0. DoRA's magnitudes scale the rows that B shapes, so they stay
    with B at the client (our reading).
    """

    name = "fedsa-lora"
    summary = "A is averaged, every client keeps its own B: personal models for half the bytes"
    source = "arXiv 2410.01463"
    traits = Traits(
        family=Family.PRODUCT_SUM,
        exact=False,
        personal=True,
        keeps_gauge=True,
        any_scaling=True,
        one_rank="the paper averages A of one rank; with clients of several ranks use replication or flexlora",
        cost_up="r*d_in",
        cost_down="r*d_in",
    )
    options: Options

    class Options(Section):
        own_head: bool = False
        """Every client also keeps its own head; otherwise heads are averaged."""

    def plan(self, round_number: int) -> Plan:
        sent: frozenset[Part] = frozenset({"A"}) if self.options.own_head else frozenset({"A", "head"})
        return Plan(up=sent, down=sent)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        own = dict(zip(updates.clients, map(self._kept, updates.adapters), strict=True))
        means = {m: Factors(state.adapter.factors[m].B, updates.mean_a(m).to(torch.float32)) for m in updates.modules}
        return replace(state.with_factors(means), personal={**state.personal, **own})

    def broadcast(self, state: ServerState, client: int) -> Adapter:
        if client not in state.personal:
            return state.adapter
        own, shared = state.personal[client], state.adapter
        factors = {m: Factors(own.factors[m].B, shared.factors[m].A) for m in shared.factors}
        return replace(own, factors=factors, head=own.head if self.options.own_head else shared.head)

    def _kept(self, adapter: Adapter) -> Adapter:
        """What a client keeps, copied out of wherever it lives: nothing that is averaged, so an A of no columns."""
        own = {m: Factors(pair.B, pair.A[:, :0]) for m, pair in adapter.factors.items()}
        kept = replace(adapter, factors=own, head=adapter.head if self.options.own_head else {})
        return Adapter.from_tensors({name: tensor.clone() for name, tensor in kept.tensors().items()})
