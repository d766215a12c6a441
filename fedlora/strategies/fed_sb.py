"""Fed-SB: only an r × r matrix between two fixed factors is trained and sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fedlora.adapter import Factors
from fedlora.adapter.factors import Triples
from fedlora.adapter.leading import Operator, subspace
from fedlora.sections import Section
from fedlora.strategies.base import ServerState
from fedlora.strategies.core import CoreStrategy, orthonormal, with_fixed


class FedSB(CoreStrategy):
    """The update is `s·B C A` with B, A fixed and shared; the mean of C is exact. arXiv 2502.15436.

    Reading: the paper finds B and A from a gradient on pooled data, which no one has in a federation; here they are the
    leading singular directions of the base weight (its LoRA-XS variant), or random orthonormal ones. Both follow from
    what every client has, so they are never sent; C starts at zero, so training starts at the base model.
    """

    name = "fed-sb"
    summary = "an r × r matrix between fixed factors is all that is trained and sent: exact, r² numbers"
    source = "arXiv 2502.15436"
    traits = replace(CoreStrategy.traits, cost_up="r*r", cost_down="r*r")
    options: Options

    class Options(Section):
        start: Literal["base", "random"] = "base"
        """Fixed factors: the leading singular directions of the base weight, or random orthonormal ones by seed."""

    def begin(self, state: ServerState, weight: Callable[[str], Tensor]) -> ServerState:
        random = self.options.start == "random"
        fixed = {}
        for position, module in enumerate(state.adapter.modules):
            rank = state.rank(module)
            fixed[module] = orthonormal(state, position) if random else _leading(weight(module), rank)
        return with_fixed(state, fixed)


def _leading(weight: Tensor, rank: int) -> Factors:
    """The leading directions of a matrix, with unit columns and rows; of a large one to ten digits of the rest."""
    matrix = weight.double()
    found = subspace(Operator(matrix), rank)
    if found is None:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        best = Triples.within(found, rank)
        left, right = best.U, best.Vh
    return Factors(left[:, :rank], right[:rank]).to(torch.float32)
