"""The conformance test must find what is wrong: one flawed strategy for each of its complaints."""

from dataclasses import replace

import pytest
import torch
from pydantic import Field

from fedlora.adapter import Factors
from fedlora.config import Section
from fedlora.strategies import registry
from fedlora.strategies.base import Family, Strategy
from fedlora.strategies.fedit import FedIT
from fedlora.testing import check_strategy, problems


@pytest.mark.parametrize("name", registry.names())
def test_every_strategy_conforms(name):
    check_strategy(name)


class Sound(FedIT):
    """FedIT under another name; the flawed ones differ from it in one thing."""


def test_an_instance_can_be_checked():
    check_strategy(Sound(), seed=3)


class KeepsCount(Sound):
    calls = 0

    def aggregate(self, state, updates):
        KeepsCount.calls += 1
        new = super().aggregate(state, updates)
        return new.with_factors({m: Factors(f.B * KeepsCount.calls, f.A) for m, f in new.adapter.factors.items()})


class ChangesUploads(Sound):
    def aggregate(self, state, updates):
        for adapter in updates.adapters:
            for pair in adapter.factors.values():
                pair.B.mul_(2)
        return super().aggregate(state, updates)


class ChangesState(Sound):
    def aggregate(self, state, updates):
        for pair in state.adapter.factors.values():
            pair.A.add_(1)
        return super().aggregate(state, updates)


class ClaimsExact(Sound):
    exact = True


class HiddenBase(Sound):
    def aggregate(self, state, updates):
        new = super().aggregate(state, updates)
        return new.with_base(
            {m: Factors(torch.ones(f.shape[0], 1), torch.ones(1, f.shape[1])) for m, f in new.adapter.factors.items()}
        )


class SecretlyPersonal(Sound):
    def broadcast(self, state, client):
        adapter = super().broadcast(state, client)
        return adapter.with_factors({m: Factors(f.B + client, f.A) for m, f in adapter.factors.items()})


class KeepsPersonal(Sound):
    def aggregate(self, state, updates):
        own = dict(zip(updates.clients, updates.adapters, strict=True))
        return replace(super().aggregate(state, updates), personal=own)


class NotFinite(Sound):
    def aggregate(self, state, updates):
        return state.with_factors({m: Factors(updates.mean_b(m) / 0, updates.mean_a(m)) for m in updates.modules})


class DividesByTheChange(Sound):
    """Well until nothing changes."""

    def aggregate(self, state, updates):
        new = {}
        for m in updates.modules:
            mean, old = updates.mean_factors(m), state.adapter.factors[m].to_double()
            new[m] = Factors(mean.B, mean.A * ((mean.A - old.A).norm() / (mean.A - old.A).norm()))
        return state.with_factors(new)


class FullRank(Sound):
    def broadcast(self, state, client):
        return state.adapter

    one_rank = ""

    def aggregate(self, state, updates):
        return state.with_factors({m: updates.mean_factors(m, state.rank(m)) for m in updates.modules})


class Dead(Sound):
    def broadcast(self, state, client):
        adapter = super().broadcast(state, client)
        return adapter.with_factors({m: Factors(f.B * 0, f.A * 0) for m, f in adapter.factors.items()})


class Doubles(Sound):
    def broadcast(self, state, client):
        adapter = super().broadcast(state, client)
        return adapter.with_factors({m: f.to_double() for m, f in adapter.factors.items()})


class Seen(dict):
    """A memory that says something by its type, which no file keeps."""


class Remembers(Sound):
    def aggregate(self, state, updates):
        new = super().aggregate(state, updates)
        scale = 2.0 if isinstance(state.memory, Seen) else 1.0
        new = new.with_factors({m: Factors(f.B * scale, f.A) for m, f in new.adapter.factors.items()})
        return replace(new, memory=Seen())


class WrongRank(Sound):
    one_rank = ""


class Fails(Sound):
    def aggregate(self, state, updates):
        raise RuntimeError("no idea")


@pytest.mark.parametrize(
    ("flawed", "complaint"),
    [
        (KeepsCount, "another result the second time"),
        (ChangesUploads, "changed the uploads"),
        (ChangesState, "changed the state"),
        (ClaimsExact, "exact is True, but ρ is"),
        (HiddenBase, "changes_base is False, but the base was updated"),
        (SecretlyPersonal, "clients of one rank receive different adapters"),
        (KeepsPersonal, "the state holds adapters of single clients"),
        (NotFinite, "values that are not finite"),
        (DividesByTheChange, "uploads in which nothing changed give values that are not finite"),
        (FullRank, "mixed ranks: client 0 of rank 2 receives"),
        (Dead, "both zero in 4 direction"),
        (Doubles, "adapters are sent in float32"),
        (WrongRank, "mixed ranks: "),
        (Remembers, "something is not in ServerState"),
        (Fails, "RuntimeError: no idea ("),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_every_flaw_is_found(flawed, complaint):
    found = problems(flawed())
    assert any(complaint in line for line in found), found
    with pytest.raises(AssertionError, match="problem"):
        check_strategy(flawed())


class Nameless(Strategy):
    family, exact, summary, source = Family.PRODUCT_SUM, False, "an example", "a test"

    def aggregate(self, state, updates):
        return state


class Undocumented(Sound):
    class Options(Section):
        strength: float = 0.5


class Demanding(Sound):
    class Options(Section):
        strength: float = Field()
        """It has no default."""

    def __init__(self):
        super().__init__(self.Options(strength=1))


@pytest.mark.parametrize(
    ("flawed", "complaint"),
    [
        (Nameless, "class attribute 'name' should be a str"),
        (Undocumented, "option 'strength' has no docstring"),
        (Demanding, "option 'strength' has no default"),
    ],
)
def test_descriptions(flawed, complaint):
    assert complaint in problems(flawed())
