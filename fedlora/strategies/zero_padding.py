"""Zero-padding: factors of different ranks are filled up with zeros and averaged."""

from __future__ import annotations

from fedlora.adapter.updates import Updates
from fedlora.strategies.base import Family, ServerState, Strategy, Traits


class ZeroPadding(Strategy):
    """`B̄, Ā` of factors padded with zeros to the highest rank; clients get the first indices up to their rank.

    The baseline for mixed ranks (arXiv 2401.06432, 2406.17477): index j is divided by all clients although only those
    with r_u > j hold it, so the higher indices are diluted. With equal ranks it is FedIT.
    """

    name = "zero-padding"
    summary = "factors padded with zeros to the highest rank and averaged: high indices are diluted"
    source = "arXiv 2401.06432, baseline"
    traits = Traits(family=Family.PRODUCT_SUM, exact=False)

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        return state.with_factors({m: updates.mean_factors(m, state.rank(m)) for m in updates.modules})
