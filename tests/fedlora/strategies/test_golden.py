"""Two clients whose every number can be worked out by hand, as the comments do."""

import pytest
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.divergence import measure
from fedlora.adapter.updates import Update, Updates
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.step import advance


def step(name, state, updates, **options):
    """(new state, what each client restarts from)."""
    strategy = registry.make(name, options)
    new = advance(strategy, state, updates)
    return new, [strategy.broadcast(new, client) for client in updates.clients]


class TestGolden:
    """Two clients with 3 and 1 examples: w = (3/4, 1/4); rank 1, one module of 2 × 3.

    B_1 = (4, 0)ᵀ, A_1 = (1, 0, 0)   B_1A_1 = [[4, 0, 0], [0, 0, 0]]
    B_2 = (0, 4)ᵀ, A_2 = (0, 2, 0)   B_2A_2 = [[0, 0, 0], [0, 8, 0]]     W* = [[3, 0, 0], [0, 2, 0]],  ‖W*‖² = 13
    """

    @pytest.fixture
    def case(self):
        one = Factors(torch.tensor([[4.0], [0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        two = Factors(torch.tensor([[0.0], [4.0]]), torch.tensor([[0.0, 2.0, 0.0]]))
        head = {"bias": torch.tensor([8.0, 0.0])}
        updates = [
            Update(5, 1, Adapter({"m": two}, {"bias": torch.tensor([0.0, 4.0])})),
            Update(2, 3, Adapter({"m": one}, head)),
        ]
        return ServerState(Adapter({"m": Factors(torch.zeros(2, 1), torch.ones(1, 3))}, head)), Updates.collect(updates)

    def test_fedit(self, case):
        new, broadcasts = step("fedit", *case)
        # B̄ = (3/4·4, 1/4·4), Ā = (3/4·1, 1/4·2, 0), head = (3/4·8, 1/4·4)
        assert new.adapter.factors["m"].B.tolist() == [[3], [1]]
        assert new.adapter.factors["m"].A.tolist() == [[0.75, 0.5, 0]]
        assert new.adapter.head["bias"].tolist() == [6, 1]
        found = measure(case[1], broadcasts).modules["m"]
        # B̄Ā − W* = [[2.25 − 3, 1.5, 0], [0.75, 0.5 − 2, 0]]: 0.5625 + 2.25 + 0.5625 + 2.25 = 5.625
        assert found.error2 == pytest.approx(5.625)
        assert found.ideal2 == pytest.approx(13)
        assert found.rho == pytest.approx((5.625 / 13) ** 0.5)
        # the singular values of W* are 3 and 2, and rank one leaves the 2 out
        assert found.floor == pytest.approx((4 / 13) ** 0.5)
        # 3/4·((2.25−4)² + 1.5² + 0.75² + 0.5²) + 1/4·(2.25² + 1.5² + 0.75² + (0.5−8)²) = 3/4·6.125 + 1/4·64.125
        assert pytest.approx(20.625) == found.R
        # B̄ − B_1 = (−1, 1), B̄ − B_2 = (3, −3): 3/4·2 + 1/4·18
        assert pytest.approx(6) == found.P
        # Ā − A_1 = (−1/4, 1/2, 0), Ā − A_2 = (3/4, −3/2, 0): 3/4·0.3125 + 1/4·2.8125
        assert pytest.approx(0.9375) == found.Q
        # W* − B_1A_1 = diag(−1, 2), W* − B_2A_2 = diag(3, −6): 3/4·5 + 1/4·45, and R is 5.625 more
        assert found.dispersion == pytest.approx(15)
        # 1/(9/16 + 1/16)
        assert found.effective_clients == pytest.approx(1.6)

    def test_svd(self, case):
        new, broadcasts = step("svd", *case)
        # W* = diag(3, 2): the larger direction is (1, 0)ᵀ(1, 0, 0), with √3 on each side and the same sign
        sign = new.adapter.factors["m"].B[0, 0].sign()
        torch.testing.assert_close(sign * new.adapter.factors["m"].B, torch.tensor([[3**0.5], [0]]))
        torch.testing.assert_close(sign * new.adapter.factors["m"].A, torch.tensor([[3**0.5, 0, 0]]))
        assert measure(case[1], broadcasts).rho == pytest.approx((4 / 13) ** 0.5, abs=1e-7)

    def test_flora_na_after_one_sweep(self, case):
        new, _ = step("flora-na", *case, max_sweeps=1)
        # Start: Â = (3/4, 1/2), ‖Â‖² = 13/16. Row i of B̂ fits (3, 0) and (0, 2):
        #   4p_1 = 3·(3/4)/(13/16) = 36/13,   4p_2 = 2·(1/2)/(13/16) = 16/13
        torch.testing.assert_close(new.diagnostics["m"]["p"], torch.tensor([9 / 13, 4 / 13], dtype=torch.float64))
        # Then B̂ = (36, 16)/13, ‖B̂‖² = 1552/169. Column j of Â fits (3, 0)ᵀ and (0, 2)ᵀ:
        #   q_1 = 3·(36/13)/(1552/169) = 351/388,   2q_2 = 2·(16/13)/(1552/169) = 26/97
        torch.testing.assert_close(new.diagnostics["m"]["q"], torch.tensor([351 / 388, 13 / 97], dtype=torch.float64))
        # Start: 5.625 as above. After, at the least-squares q: ‖W*‖² − ⟨B̂Â, W*⟩ = 13 − 3·(36/13)·q_1 − 2·(16/13)·2q_2
        torch.testing.assert_close(
            new.diagnostics["m"]["objective"],
            torch.tensor([5.625, 13 - 3 * (36 / 13) * (351 / 388) - 2 * (16 / 13) * (26 / 97)], dtype=torch.float64),
        )

    def test_flora_na_converged(self, case):
        new, broadcasts = step("flora-na", *case)
        # At rank one with orthogonal clients the best combination is the larger client alone: B̂Â = 3 at (0, 0).
        torch.testing.assert_close(
            new.adapter.factors["m"].product(), torch.tensor([[3.0, 0, 0], [0, 0, 0]]), atol=1e-4, rtol=0
        )
        # Gauge: ‖B̂‖/‖Â‖ = ‖B̄‖/‖Ā‖ = √10/√(9/16 + 4/16) and ‖B̂‖·‖Â‖ = 3, so ‖B̂‖² = 3·√(160/13)
        assert float(new.adapter.factors["m"].B.norm()) ** 2 == pytest.approx(3 * (160 / 13) ** 0.5, rel=1e-4)
        mixing = {"m": new.diagnostics["m"]["p"]}
        assert measure(case[1], broadcasts, mixing).effective_clients == pytest.approx(1, abs=1e-3)
