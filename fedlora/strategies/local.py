"""Local training: the control in which nothing is shared."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlora.adapter import Adapter
from fedlora.adapter.updates import Updates
from fedlora.strategies.base import NOTHING, Family, Plan, ServerState, Strategy, Traits


class Local(Strategy):
    """Every client goes on with its own adapter and head; nothing travels. The control for what federation gains."""

    name = "local"
    summary = "control: each client trains alone, nothing is sent"
    source = "control"
    traits = Traits(
        family=Family.CONTROL,
        exact=False,
        personal=True,
        keeps_gauge=True,
        any_scaling=True,
        cost_up="0",
        cost_down="0",
    )

    def plan(self, round_number: int) -> Plan:
        return Plan(up=NOTHING, down=NOTHING)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        own = dict(zip(updates.clients, updates.adapters, strict=True))
        alone = {module: {"p": torch.ones(1, device=updates.weights.device)} for module in updates.modules}
        return replace(state, personal={**state.personal, **own}, diagnostics=alone)

    def broadcast(self, state: ServerState, client: int) -> Adapter:
        return state.personal[client] if client in state.personal else super().broadcast(state, client)
