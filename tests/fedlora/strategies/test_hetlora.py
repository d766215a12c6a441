"""HetLoRA: weights by the size of the update, the penalty on the tail, and clients that prune their own rank."""

import pytest
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.updates import Update, Updates
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.hetlora import sparsity_weights
from fedlora.strategies.step import advance


def one(B, A) -> Adapter:
    return Adapter({"m": Factors(torch.tensor(B), torch.tensor(A))})


def make(**options):
    return registry.make("hetlora", options)


class TestWeights:
    """‖B_1A_1‖ = 3·2 = 6 at rank 1, ‖B_2A_2‖ = √(4² + 2²) = √20 at rank 2; the examples do not count."""

    @pytest.fixture
    def adapters(self):
        return one([[3.0], [0.0]], [[0.0, 2.0, 0.0]]), one([[4.0, 0.0], [0.0, 1.0]], [[1.0, 0, 0], [0, 0, 2.0]])

    def test_are_shares_of_the_norms(self, adapters):
        updates = Updates.collect([Update(0, 99, adapters[0]), Update(1, 1, adapters[1])])
        wanted = torch.tensor([6, 20**0.5], dtype=torch.float64) / (6 + 20**0.5)
        torch.testing.assert_close(sparsity_weights(updates, "m"), wanted)

    def test_leave_out_clients_without_weight(self, adapters):
        updates = Updates.collect([Update(0, 0, adapters[0]), Update(1, 1, adapters[1])])
        assert sparsity_weights(updates, "m").tolist() == [0, 1]

    def test_are_the_clients_own_where_nothing_was_learned(self):
        zero = one([[0.0]], [[1.0, 2.0]])
        updates = Updates.collect([Update(0, 3, zero), Update(1, 1, zero)])
        assert sparsity_weights(updates, "m").tolist() == [0.75, 0.25]

    def test_are_by_module_and_reported(self, rounds):
        played = rounds.play("hetlora", 4, True)
        found = played.measured()
        for module in rounds.modules:
            norms = torch.stack([f.product().double().norm() for f in played.sent.factors(module)])
            p = played.after.diagnostics[module]["p"]
            torch.testing.assert_close(p, norms / norms.sum(), rtol=1e-6, atol=0)
            assert found.modules[module].effective_clients == pytest.approx(1 / float(p.square().sum()))


class TestPenalty:
    """B = [[1, 2, 0], [0, 0, 2]], A = I (3 × 4) scaled; keep 0.67 of rank 3 is 2, so the tail is index 2."""

    start = one([[1.0, 2.0, 0.0], [0.0, 0.0, 2.0]], [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 3.0, 4.0]])

    def live(self, pad=0):
        pair = self.start.factors["m"].at_rank(3 + pad)
        return {"m": Factors(pair.B.clone().requires_grad_(), pair.A.clone().requires_grad_())}

    @pytest.mark.parametrize("pad", [0, 2])
    def test_by_hand(self, pad):
        """½·‖(0, 2)‖·‖(0, 0, 3, 4)‖ = ½·2·5, and live factors may be padded to the highest rank."""
        live = self.live(pad)
        found = make(keep=0.67, penalty=0.5).penalty(live, self.start)
        assert found.item() == pytest.approx(5)
        found.backward()
        # d/dB ½‖b‖‖a‖ = ½·(b/‖b‖)·‖a‖ on the tail and nothing elsewhere; likewise for A
        wanted_b, wanted_a = torch.zeros(2, 3 + pad), torch.zeros(3 + pad, 4)
        wanted_b[1, 2] = 2.5
        wanted_a[2] = torch.tensor([0, 0, 0.6, 0.8])
        torch.testing.assert_close(live["m"].B.grad, wanted_b)
        torch.testing.assert_close(live["m"].A.grad, wanted_a)

    def test_adds_over_modules(self):
        live = self.live()
        found = make(keep=0.67, penalty=1).penalty({"m": live["m"], "n": live["m"]}, self.start)
        assert found.item() == pytest.approx(20)

    def test_of_a_fresh_adapter_has_a_finite_gradient(self):
        """B = 0, where the norm has no derivative."""
        live = {"m": Factors(torch.zeros(2, 3, requires_grad=True), torch.ones(3, 4, requires_grad=True))}
        make(keep=0.5).penalty(live, self.start).backward()
        assert torch.isfinite(live["m"].B.grad).all()
        assert torch.isfinite(live["m"].A.grad).all()

    @pytest.mark.parametrize("options", [{"penalty": 0}, {"keep": 1}])
    def test_none_where_nothing_is_to_be_pruned(self, options):
        assert make(**options).penalty(self.live(), self.start) is None

    def test_rank_one_has_no_tail(self):
        start = one([[1.0]], [[1.0, 2.0]])
        assert make(keep=0.5).penalty(dict(start.factors), start) is None

    def test_others_have_none(self, rounds):
        for name in rounds.expected.keys() - {"hetlora"}:
            assert registry.make(name).penalty(self.live(), self.start) is None


class TestPruning:
    start = one([[1.0, 2.0, 1.0], [0.0, 0.0, 1.0]], [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 1.0]])

    def trained(self, tail):
        pair = self.start.factors["m"]
        return one(pair.B.tolist(), [*pair.A[:2].tolist(), (tail * pair.A[2]).tolist()])

    @pytest.mark.parametrize(("tail", "rank"), [(0.99, 2), (1.0, 3), (1.01, 3), (0.0, 2)])
    def test_when_the_tail_has_shrunk(self, tail, rank):
        trained = self.trained(tail)
        uploaded = make(keep=0.67).after_training(self.start, trained)
        assert uploaded.rank == rank
        assert torch.equal(uploaded.factors["m"].A, trained.factors["m"].A[:rank])

    @pytest.mark.parametrize(
        ("keep", "of", "rank"),
        [(0.58, 50, 29), (0.29, 100, 29), (0.57, 100, 57), (0.7, 10, 7), (0.55, 20, 11), (0.9999, 8, 7), (0.1, 4, 1)],
    )
    def test_the_share_is_the_decimal_that_was_typed(self, keep, of, rank):
        """In binary 0.58 · 50 is 28.999…"""
        assert make(keep=keep)._kept(of) == rank

    @pytest.mark.parametrize(("keep", "rank"), [(0.34, 1), (0.67, 2), (0.1, 1), (0.99, 2), (1, 3)])
    def test_to_a_share_rounded_down_and_at_least_one(self, keep, rank):
        assert make(keep=keep).after_training(self.start, self.trained(0.5)).rank == rank

    def test_the_ranks_shrink_for_good(self):
        """Through `advance`: the pruned client gets its new rank from then on, the others keep theirs."""
        strategy = make(keep=0.67)
        state = ServerState(self.start, ranks={5: 2})
        pruned = strategy.after_training(self.start, self.trained(0.5))
        lower = self.start.cut(2)
        first = advance(strategy, state, Updates.collect([Update(1, 1, pruned), Update(2, 1, self.start)]))
        assert first.ranks == {5: 2, 1: 2}
        assert [strategy.broadcast(first, client).rank for client in (1, 2, 5, 9)] == [2, 3, 2, 3]
        again = strategy.after_training(lower, lower.cut(1))
        second = advance(strategy, first, Updates.collect([Update(1, 1, lower), Update(5, 1, again)]))
        assert second.ranks == {5: 1, 1: 2}
        assert second.adapter.rank == 3
        assert state.ranks == {5: 2}

    def test_others_upload_what_they_trained(self, rounds):
        trained = self.trained(0.5)
        for name in rounds.expected.keys() - {"hetlora"}:
            assert registry.make(name).after_training(self.start, trained) is trained
