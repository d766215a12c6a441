"""A round of any strategy, as its clients could really have played it, and what each must hold afterwards: every
strategy written down once more on dense float64 matrices, with no algebra of fedlora's.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from rosters import NAMES, entries

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.updates import Update, Updates
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.step import advance, measure_round

RANKS = (2, 3, 1)
"""Of clients in turn, where they are mixed; 3 is the highest."""
SCALING = {"lora": 12 / 3, "rslora": 12 / 3**0.5}
OPTIONS = {
    "flora-na": {"max_sweeps": 8, "tolerance": 0},
    "florist": {"energy": 1.0},
    "fedmomentum": {"energy": 1.0},
    "ravan": {"heads": 3},
}
"""Where a strategy stops at a place that the oracle does too, and where it loses nothing of its own accord."""


@dataclass(frozen=True)
class Played:
    """One round: the state before, the uploads, the state after."""

    strategy: Strategy
    before: ServerState
    updates: Updates
    after: ServerState

    @property
    def sent(self) -> Updates:
        """The uploads as plain factors, where they have cores."""
        return self.updates.folded()

    @property
    def broadcasts(self) -> list[Adapter]:
        return [self.strategy.broadcast(self.after, client) for client in self.updates.clients]

    def held(self, module: str) -> list[np.ndarray]:
        """The update that each client holds: s·B@A and what its base got in this round (d_out × d_in, float64)."""
        step = self.after.base_step.modules.get(module)
        base = 0 if step is None else array(step.B) @ array(step.A)
        pairs = [broadcast.folded().factors[module] for broadcast in self.broadcasts]
        return [self.after.scaling * array(pair.B) @ array(pair.A) + base for pair in pairs]

    def measured(self):
        return measure_round(self.strategy, self.after, self.updates)


class DenseRound:
    """What a module's clients uploaded, as arrays: `pairs` at the clients' ranks, `w` their shares, `start` the global
    factors (B, A) before the round at the highest rank."""

    def __init__(self, dense, played: Played, module: str, w: np.ndarray) -> None:
        self.dense, self.w, self.number = dense, w, played.before.round + 1
        self.pairs = [(array(pair.B), array(pair.A)) for pair in played.sent.factors(module)]
        self.ranks = [A.shape[0] for _, A in self.pairs]
        self.B0, self.A0 = (array(part) for part in vars(played.before.adapter.factors[module]).values())
        self.top = self.A0.shape[0]
        self.ideal = dense.mean_product(self.pairs, w)

    @property
    def padded(self):
        return [
            (np.pad(B, ((0, 0), (0, self.top - r))), np.pad(A, ((0, self.top - r), (0, 0))))
            for (B, A), r in zip(self.pairs, self.ranks, strict=True)
        ]

    def means(self, w=None):
        """B̄ and Ā of factors padded with zeros."""
        w = self.w if w is None else w
        return (
            sum(x * B for x, (B, _) in zip(w, self.padded, strict=True)),
            sum(x * A for x, (_, A) in zip(w, self.padded, strict=True)),
        )

    def cut(self, B, A):
        """Each client's product of the first indices, up to its rank."""
        return [B[:, :r] @ A[:r] for r in self.ranks]

    def optimum(self, matrix):
        return [self.dense.truncated(matrix, r) for r in self.ranks]

    def everybody(self, matrix):
        return [matrix] * len(self.w)

    def by_norm(self):
        norms = np.array([x and np.linalg.norm(B @ A) for x, (B, A) in zip(self.w, self.pairs, strict=True)])
        return norms / norms.sum()

    def by_owners(self):
        """Index by index, over the clients that have it; the value before the round where nobody has."""
        B, A = self.B0.copy(), self.A0.copy()
        for j in range(self.top):
            owners = [u for u, r in enumerate(self.ranks) if r > j and self.w[u] > 0]
            if owners:
                share = sum(self.w[u] for u in owners)
                B[:, j] = sum(self.w[u] * self.pairs[u][0][:, j] for u in owners) / share
                A[j] = sum(self.w[u] * self.pairs[u][1][j] for u in owners) / share
        return B, A

    def products_by_owners(self):
        """Index by index the mean of products; of the previous ones where nobody has the index."""
        total = np.zeros((len(self.B0), self.A0.shape[1]))
        for j in range(self.top):
            owners = [u for u, r in enumerate(self.ranks) if r > j and self.w[u] > 0]
            share = sum(self.w[u] for u in owners)
            total += sum(self.w[u] / share * np.outer(self.pairs[u][0][:, j], self.pairs[u][1][j]) for u in owners)
            total += 0 if owners else np.outer(self.B0[:, j], self.A0[j])
        return total

    def corrected(self, ridge=0.01):
        """LoRA-FAIR's ridge regression, as ordinary least squares on an extended system."""
        B, A = self.means()
        root = np.sqrt(ridge * np.trace(A @ A.T) / self.top)
        system = np.vstack([A.T, root * np.eye(self.top)])
        wanted = np.vstack([(self.ideal - B @ A).T, np.zeros((self.top, len(B)))])
        return B + np.linalg.lstsq(system, wanted, rcond=None)[0].T, A

    def fitted(self):
        p, q, _ = self.dense.alternating(self.padded, self.w, OPTIONS["flora-na"]["max_sweeps"], 0)
        return self.means(p)[0], self.means(q)[1]

    def taking_turns(self):
        return (self.means()[0], self.A0) if self.number % 2 else (self.B0, self.means()[1])


EXPECTED = {
    "fedit": lambda r: r.cut(*r.means()),
    "ffa-lora": lambda r: r.cut(r.means()[0], r.A0),
    "fedsa-lora": lambda r: [B @ r.means()[1] for B, _ in r.pairs],
    "rolora": lambda r: r.cut(*r.taking_turns()),
    "flora": lambda r: r.everybody(r.ideal),
    "fedex-lora": lambda r: r.everybody(r.ideal),
    "flexlora": lambda r: r.optimum(r.ideal),
    "svd": lambda r: r.optimum(r.ideal),
    "flora-na": lambda r: r.cut(*r.fitted()),
    "lora-fair": lambda r: r.cut(*r.corrected()),
    "zero-padding": lambda r: r.cut(*r.means()),
    "hetlora": lambda r: r.cut(*r.means(r.by_norm())),
    "replication": lambda r: r.cut(*r.by_owners()),
    "raflora": lambda r: r.optimum(r.products_by_owners()),
    "fedrot-lora": lambda r: r.cut(*r.means()),  # in the first round; see test_newer.py
    "fedmomentum": lambda r: r.everybody(r.ideal),
    "florist": lambda r: r.everybody(r.ideal),
    "fed-sb": lambda r: r.everybody(r.ideal),
    "ravan": lambda r: r.everybody(r.ideal),
    "fedsvd": lambda r: r.optimum(r.means()[0] @ r.A0),
    "oracle": lambda r: r.everybody(r.ideal),
    "local": lambda r: [B @ A for B, A in r.pairs],
    "centralised": lambda r: r.everybody(r.ideal),
}
"""Without the scaling: B@A that every client must hold."""


class Rounds:
    """Makes and plays rounds; the weights are kept unequal unless told otherwise."""

    expected, names = EXPECTED, NAMES

    def __init__(self, dense, uploads) -> None:
        self.dense, self.uploads, self.modules, self.rank = dense, uploads, uploads.modules, uploads.rank

    def state(self, strategy: Strategy, mixed=False, scaling=4.0, number=1, learned=0.3, modules=None, rank=None):
        """Before round `number`: A random, B of the size `learned`; clients 0, 1, 2 … have RANKS in turn if mixed."""
        start = self.uploads.adapter(99, modules or self.modules, rank or self.rank)
        factors = {m: Factors(learned * f.B, f.A) for m, f in start.factors.items()}
        ranks = {u: RANKS[u % 3] for u in range(250) if RANKS[u % 3] < start.rank} if mixed else {}
        fresh = ServerState(start.with_factors(factors), ranks=ranks, scaling=scaling, seed=5)
        weights = {m: self.uploads.factors(f.shape, 4, self.uploads.generator(3)).product() for m, f in factors.items()}
        return replace(strategy.begin(fresh, weights.__getitem__), round=number - 1)

    def train(self, strategy: Strategy, state: ServerState, client: int, seed=0, drift=1.0) -> Adapter:
        """What `client` uploads: what was broadcast to it, with the parts that it trains moved at random."""
        start, parts = strategy.broadcast(state, client), strategy.plan(state.round + 1).trains
        g = self.uploads.generator(1000 * seed + 7 * client + 1)

        def moved(tensor, part):
            step = drift * torch.randn(tensor.shape, generator=g)
            return tensor + step if part in parts else tensor

        factors = {m: Factors(moved(f.B, "B"), moved(f.A, "A")) for m, f in start.factors.items()}
        head = {k: moved(t, "head") for k, t in start.head.items()}
        return replace(start, factors=factors, head=head, cores={m: moved(c, "core") for m, c in start.cores.items()})

    def uploaded(self, strategy, state, count, seed=0, drift=1.0) -> list[Update]:
        """One upload each of clients 0 … count − 1; of one client where the strategy knows no more."""
        counts = self.uploads.example_counts(1 if strategy.traits.pools_data else count)
        return [Update(u, n, self.train(strategy, state, u, seed, drift)) for u, n in enumerate(counts)]

    def situation(self, name, count=5, mixed=False, seed=0, drift=1.0, **state):
        """(strategy, state, list of uploads)."""
        strategy = self.make(name)
        before = self.state(strategy, mixed, **state)
        return strategy, before, self.uploaded(strategy, before, count, seed, drift)

    @staticmethod
    def make(name, **options) -> Strategy:
        return registry.make(name, OPTIONS.get(name, {}) | options)

    @staticmethod
    def run(strategy: Strategy | str, state: ServerState, updates, weighting="examples", svd_order=False) -> Played:
        strategy = Rounds.make(strategy) if isinstance(strategy, str) else strategy
        given = updates if isinstance(updates, Updates) else Updates.collect(updates, weighting)
        return Played(strategy, state, given, advance(strategy, state, given, svd_order))

    def play(self, name, count=5, mixed=False, **more) -> Played:
        return self.run(*self.situation(name, count, mixed, **more))

    def wanted(self, played: Played, module: str, w) -> list[np.ndarray]:
        """The oracle: the update that each client must hold (d_out × d_in, scaling included)."""
        products = EXPECTED[played.strategy.name](DenseRound(self.dense, played, module, np.asarray(w)))
        return [played.before.scaling * product for product in products]

    def own(self, played: Played, module: str) -> list[np.ndarray]:
        """The update that each client had trained."""
        return [played.before.scaling * array(f.B) @ array(f.A) for f in played.sent.factors(module)]

    @staticmethod
    def close(actual: np.ndarray, wanted: np.ndarray, tolerance=1e-5) -> None:
        """Relative, in the Frobenius norm."""
        assert actual.shape == wanted.shape
        assert np.linalg.norm(actual - wanted) <= tolerance * max(np.linalg.norm(wanted), 1e-30)

    @staticmethod
    def same(one: Adapter, other: Adapter) -> None:
        """Bit for bit."""
        mine, theirs = one.tensors(), other.tensors()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


@pytest.fixture(scope="session")
def rounds(dense, uploads) -> Rounds:
    return Rounds(dense, uploads)


@pytest.fixture(params=NAMES)
def name(request) -> str:
    """Every strategy of ours."""
    return request.param


@pytest.fixture(params=entries())
def entry(request) -> tuple[str, bool]:
    """Every strategy with clients of one rank, and of several where it is not refused."""
    return request.param


@pytest.fixture(params=entries(of=EXPECTED))
def table(request) -> tuple[str, bool]:
    """As `entry`, of the strategies with an oracle here."""
    return request.param
