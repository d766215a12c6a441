"""FedIT: the mean of each factor."""

from __future__ import annotations

from fedlora.adapter.updates import Updates
from fedlora.strategies.base import Family, ServerState, Strategy, Traits


class FedIT(Strategy):
    """`B̄ = Σ w_u B_u`, `Ā = Σ w_u A_u` (product-sum). arXiv 2305.05644."""

    name = "fedit"
    summary = "mean of each factor; the product of means is not the mean of products"
    source = "arXiv 2305.05644"
    traits = Traits(
        family=Family.PRODUCT_SUM,
        exact=False,
        one_rank="factors of different ranks have no mean; zero-padding, replication and flexlora say how to form one",
    )

    def aggregate(self, state: ServerState, updates: Updates) -> ServerState:
        return state.with_factors({module: updates.mean_factors(module) for module in updates.modules})
