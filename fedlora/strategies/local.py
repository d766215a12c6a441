"""Local training: the control in which nothing is shared."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlora.adapter import Adapter
from fedlora.strategies.base import NOTHING, Family, Plan, ServerState, Strategy
from fedlora.updates import Updates


class Local(Strategy):
    """Every client goes on with its own adapter and head; nothing travels. The control for what federation gains."""

    name, family, exact = "local", Family.CONTROL, False
    personal = True
    summary = "control: each client trains alone, nothing is sent"
    source = "control"

    def plan(self, round_number: int) -> Plan:
        return Plan(sends=NOTHING)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        own = dict(zip(updates.clients, updates.adapters, strict=True))
        alone = {module: {"p": torch.ones(1)} for module in updates.modules}
        return replace(state, personal={**state.personal, **own}, diagnostics=alone)

    def broadcast(self, state: ServerState, client: int) -> Adapter:
        return state.personal.get(client, state.adapter)
