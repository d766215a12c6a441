"""Centralised training: the control in which the data is not distributed."""

from __future__ import annotations

from fedlora.adapter.updates import Updates
from fedlora.strategies.base import NOTHING, Family, Plan, ServerState, Strategy, Traits


class Centralised(Strategy):
    """One client with everybody's data, as many optimiser steps a round as one client takes (on average, with
    `local_epochs`). The control for what the distribution of the data costs. What it costs to move the data is not
    counted."""

    name = "centralised"
    summary = "control: one client with all the data, the same number of optimiser steps"
    source = "control"
    traits = Traits(
        family=Family.CONTROL, exact=True, pools_data=True, one_rank="there is one client", cost_up="0", cost_down="0"
    )

    def plan(self, round_number: int) -> Plan:
        return Plan(up=NOTHING, down=NOTHING)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        own = updates.adapters[0]
        return state.with_factors(dict(own.factors)).with_head(own.head).with_magnitudes(own.magnitudes)
