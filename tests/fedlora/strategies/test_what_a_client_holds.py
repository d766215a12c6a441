"""What is counted as sent to a client brings it to what the strategy says it restarts from, however long it was away.

Rounds are played on tiny factors, in a real run folder. A stand-in for every client keeps what follows from the seed,
what it trained itself, and what was counted as sent to it; nothing else.
"""

from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pytest
import torch

from fedlora.adapter.base_update import BaseUpdate
from fedlora.adapter.divergence import Divergence, ModuleDivergence
from fedlora.adapter.updates import Update, Updates
from fedlora.adapter.weights import Adapter, wire_size
from fedlora.metrics import Bytes
from fedlora.run import traffic
from fedlora.run.participation import Entry
from fedlora.run.runfolder import RunFolder
from fedlora.run.server import Server, Timings
from fedlora.seeds import Turn
from fedlora.strategies.flora import begun_anew
from fedlora.strategies.step import advance

FRESH = ("flora", "florist")
"""Whose A is drawn anew by seed and round, at the client too."""
PRESENT = ([0, 1], [2], [0, 3], [1, 3], [3], [0, 1, 2, 3], [0, 1], [2, 0])
"""Who is asked, round by round: everybody is away for none, one and several rounds, once for an even number."""
MODULES = {"one": (9, 14), "other": (31, 5)}
UNMEASURED = Divergence({"one": ModuleDivergence(*(0.0,) * 8, {})})
SILENT = {(1, 1), (4, 1), (6, 0)}
"""(round, client): asked, but its update did not arrive."""


@dataclass
class Client:
    """What a client has on its disk."""

    held: dict[str, torch.Tensor]
    base: dict[str, np.ndarray] = field(default_factory=dict)
    since: int = 0
    """The round whose base steps it has not got yet."""


class World:
    """A run folder in which rounds are played, and the clients beside it."""

    def __init__(self, rounds, configure, path, name, mixed=False, **settings) -> None:
        self.rounds, self.strategy = rounds, rounds.make(name)
        config = configure({"strategy": name, "clients": 4, "rounds": len(PRESENT), "keep_rounds": None, **settings})
        self.run = RunFolder.create(path, config)
        self.state = rounds.state(self.strategy, mixed, learned=0.0, modules=MODULES)
        self.run.write_state(self.state, {})
        Server(self.run).close(0, [], [], Timings())
        start = self.state
        self.clients = [Client(self.strategy.broadcast(start, u).tensors()) for u in range(4)]
        self.steps: list[BaseUpdate] = []

    def play(self, present, silent=(), risen=None) -> dict[int, Bytes]:
        """A round; returns what was counted for each client, after it was checked against what the client holds."""
        number, counted, updates = self.state.round + 1, {}, []
        for client in present:
            counted[client] = self._receive(number, client)
            trained = self.rounds.train(self.strategy, self.state, client, seed=number)
            if client not in silent:
                updates.append(Update(client, 3 + client, trained))
        self.state = advance(self.strategy, self.state, Updates.collect(updates))
        if self.strategy.traits.personal or self.strategy.traits.pools_data:
            for update in updates:
                self.clients[update.client].held |= update.adapter.tensors()
        self.state = replace(self.state, ranks={**self.state.ranks, **(risen or {})})
        self.steps.append(self.state.base_step)
        outcome = {"divergence": UNMEASURED.to_json(), "bytes": asdict(Bytes()), "seconds": 0.0}
        self.run.write_state(self.state, outcome)
        roll = [asdict(Entry(client, 0, "crashed")) for client in present]
        self.run.write_json(self.run.roll_name(number), {"entries": roll})
        Server(self.run).close(number, [], [], Timings())
        return counted

    def crossing(self, turn, start) -> Bytes:
        """What is counted for a client that sends nothing."""
        return traffic.crossing(self.run, turn, traffic.due(self.run, turn, self.state.base, start), start, None)

    def _receive(self, number, client) -> Bytes:
        start = self.strategy.broadcast(self.state, client)
        turn = Turn(self.run.config.seed, number, client)
        counted = self.crossing(turn, start)
        parts = traffic.parts_down(self.run, turn, start)
        assert (counted.down_adapter, counted.down_head) == wire_size(start, parts)
        assert (counted.up_adapter, counted.up_head) == (0, 0)
        mine = self.clients[client]
        known = mine.held | (self._drawn(client) if self.strategy.name in FRESH else {})
        mine.held = known | start.tensors(parts)
        wanted = start.tensors()
        assert mine.held.keys() == wanted.keys()
        for tensor, value in wanted.items():
            assert torch.equal(mine.held[tensor], value), f"client {client} in round {number} lacks {tensor}"
        self._update_base(mine, number, counted.down_base)
        return counted

    def _drawn(self, client) -> dict[str, torch.Tensor]:
        """The fresh factors that follow from seed and round."""
        if not self.state.round:
            return {}
        before = replace(self.state, round=self.state.round - 1)
        fresh = {module: begun_anew(before, module) for module in self.state.adapter.modules}
        own = Adapter(fresh, kinds=self.state.adapter.kinds).cut(self.state.rank_of(client))
        return own.tensors()

    def _update_base(self, mine, number, paid) -> None:
        """All steps that it lacks, or the whole update: what was paid for."""
        lacking = self.steps[mine.since :]
        if paid == sum(step.wire_bytes() for step in lacking):
            for step in lacking:
                for module, pair in step.modules.items():
                    mine.base[module] = mine.base.get(module, 0) + pair.to_double().product().numpy()
        else:
            assert paid == self.state.base.wire_bytes() < sum(step.wire_bytes() for step in lacking)
            mine.base = {m: pair.to_double().product().numpy() for m, pair in self.state.base.modules.items()}
        mine.since = number - 1
        for module, pair in self.state.base.modules.items():
            self.rounds.close(mine.base[module], pair.to_double().product().numpy())


def test_what_was_counted_as_sent_is_what_a_client_restarts_from(entry, rounds, configure, tmp_path):
    """Every strategy; clients that are away, that join late, and whose update does not arrive."""
    name, mixed = entry
    world = World(rounds, configure, tmp_path / "run", name, mixed)
    for number, present in enumerate(PRESENT, start=1):
        asked = [0] if world.strategy.traits.pools_data else present
        world.play(asked, {client for r, client in SILENT if r == number} if len(asked) > 1 else ())


@pytest.mark.parametrize("everybody", [True, False])
def test_with_everybody_present_bytes_are_those_of_the_plan(name, rounds, configure, tmp_path, everybody):
    """Parameters of the cost table, and not one byte more; the base update of one round."""
    world = World(rounds, configure, tmp_path / "run", name)
    present = [0] if world.strategy.traits.pools_data else [0, 1, 2, 3]
    for number in range(1, 5):
        before, plan = world.state, world.strategy.plan(number)
        if not everybody and not world.strategy.traits.pools_data:
            present = [0, number % 3 + 1]
        counted = world.play(present)[0]
        start = world.strategy.broadcast(before, 0)
        assert (counted.down_adapter, counted.down_head) == wire_size(start, plan.down)
        assert counted.down_base == before.base_step.wire_bytes()


class TestRoLoRA:
    @pytest.fixture
    def world(self, rounds, configure, tmp_path):
        return World(rounds, configure, tmp_path / "run", "rolora")

    def test_who_was_away_is_sent_both_factors_and_who_was_not_one(self, world):
        adapter = world.state.adapter
        a, b, both = (wire_size(adapter, frozenset(parts))[0] for parts in ("A", "B", "AB"))
        paid = [world.play(present) for present in ([0, 1], [0, 2], [0, 1], [0, 1], [0, 3])]
        assert [counted[0].down_adapter for counted in paid] == [a, b, a, b, a]
        assert paid[2][1].down_adapter == both  # away in round two
        assert paid[3][1].down_adapter == b  # and back
        assert paid[1][2].down_adapter == paid[4][3].down_adapter == both  # for the first time

    def test_who_is_asked_again_in_a_round_gets_its_broadcast_again(self, world):
        world.play([0, 1])
        world.play([0])
        start, turn = world.strategy.broadcast(world.state, 1), Turn(world.run.config.seed, 3, 1)
        first = traffic.parts_down(world.run, turn, start)
        world.run.write_json(world.run.roll_name(3), {"entries": [asdict(Entry(1, 0, "crashed"))]})
        again = traffic.parts_down(world.run, replace(turn, attempt=1), start)
        assert ({"A", "B"} <= first, {"A", "B"} & again) == (True, {"A"})

    def test_a_client_whose_rank_has_risen_is_sent_the_new_indices_of_both(self, rounds, configure, tmp_path):
        world = World(rounds, configure, tmp_path / "run", "rolora", mixed=True)
        world.play([0, 1], risen={0: 3})  # of two indices it had
        assert world.state.rank_of(0) == 3
        counted = world.play([0, 1])
        at_three, at_two = (world.state.adapter.cut(rank) for rank in (3, 2))
        assert counted[0].down_adapter == wire_size(at_three, frozenset("AB"))[0]
        assert counted[1].down_adapter == wire_size(at_three, frozenset("B"))[0]
        assert wire_size(at_two, frozenset("B"))[0] < counted[1].down_adapter


def test_a_base_update_is_sent_once_to_who_is_asked_again(rounds, configure, tmp_path):
    world = World(rounds, configure, tmp_path / "run", "flora")
    world.play([0, 1])
    start, turn = world.strategy.broadcast(world.state, 0), Turn(world.run.config.seed, 2, 0)
    first = world.crossing(turn, start)
    world.run.write_json(world.run.roll_name(2), {"entries": [asdict(Entry(0, 0, "crashed"))]})
    again = world.crossing(replace(turn, attempt=1), start)
    assert (first.down_base, again.down_base) == (world.state.base_step.wire_bytes(), 0)
