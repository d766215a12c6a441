"""A server state as tensors and JSON, and back: every field, bit for bit."""

import json
from dataclasses import fields, replace

import pytest
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.base_update import BaseUpdate
from fedlora.adapter.updates import Updates
from fedlora.errors import AdapterError
from fedlora.files.tensorfile import read_tensors, serialise
from fedlora.strategies import registry
from fedlora.strategies import state as states
from fedlora.strategies.base import ServerState
from fedlora.strategies.step import advance


def equal(one, other) -> bool:
    """Bit for bit, through adapters and mappings."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, Adapter | BaseUpdate):
        return equal(one.tensors(), other.tensors()) and getattr(one, "kinds", 0) == getattr(other, "kinds", 0)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return one == other


def through_the_disk(state, tmp_path) -> ServerState:
    path = tmp_path / "state.safetensors"
    path.write_bytes(serialise(states.tensors(state)))
    return states.from_tensors(read_tensors(path), json.loads(json.dumps(states.scalars(state))))


@pytest.fixture
def full(uploads) -> ServerState:
    """No field at its default."""
    adapter = uploads.adapter(0)
    adapter = replace(
        adapter,
        magnitudes={"narrow": torch.rand(9)},
        kinds={"narrow": "embedding"},
        cores={"encoder.layer.1.mlp": torch.rand(3, 3), "encoder.layer.0.query": torch.rand(3, 1, 1)},
    )
    step = BaseUpdate({"narrow": uploads.factors((9, 14), 2, uploads.generator(1))})
    return ServerState(
        adapter=adapter,
        personal={3: uploads.adapter(3), 12: replace(uploads.adapter(4), head={})},
        diagnostics={
            "narrow": {"p": torch.rand(4, dtype=torch.float64), "q": torch.rand(4)},
            "a.b": {"p": torch.rand(2)},
        },
        round=7,
        base=step.plus(BaseUpdate({"encoder.layer.1.mlp": uploads.factors((17, 53), 1, uploads.generator(2))})),
        base_step=step,
        memory={"momentum/narrow": torch.rand(2, 2), "count": torch.tensor([3])},
        ranks={3: 2, 100: 1},
        scaling=12 / 3**0.5,
        seed=2**40 + 1,
    )


@pytest.mark.parametrize("name", [field.name for field in fields(ServerState)])
def test_every_field_survives(full, tmp_path, name):
    read = through_the_disk(full, tmp_path)
    default = next(field for field in fields(ServerState) if field.name == name)
    assert name == "adapter" or getattr(full, name) != default.default
    assert equal(getattr(read, name), getattr(full, name))


def test_a_bare_state_survives(uploads, tmp_path):
    bare = ServerState(uploads.adapter(0))
    read = through_the_disk(bare, tmp_path)
    assert all(equal(getattr(read, field.name), getattr(bare, field.name)) for field in fields(ServerState))


def test_what_is_shared_in_memory_is_stored_each_time(uploads, tmp_path):
    """A personal adapter may hold the global A itself, and cuts of it."""
    adapter = uploads.adapter(0)
    state = ServerState(adapter, personal={1: adapter, 2: adapter.cut(2)})
    read = through_the_disk(state, tmp_path)
    assert equal(read.personal[1], adapter)
    assert equal(read.personal[2], adapter.cut(2))


@pytest.mark.parametrize("name", list(registry._BUILTIN))
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(uploads, tmp_path, name):
    """Two rounds in one go, and with the state through the disk between them."""
    strategy = registry.make(name, {"heads": 3} if name == "ravan" else {})
    start = uploads.adapter(50)
    zero = {m: Factors(torch.zeros_like(f.B), f.A) for m, f in start.factors.items()}
    weights = {m: f.product() for m, f in start.factors.items()}
    state = strategy.begin(ServerState(start.with_factors(zero), scaling=4.0, seed=3), weights.__getitem__)
    given = uploads.list(1 if strategy.traits.pools_data else 3)
    cores = state.adapter.cores
    given = [
        replace(update, adapter=replace(update.adapter, cores={m: c + 1 for m, c in cores.items()})) for update in given
    ]
    updates = Updates.collect(given)
    first = advance(strategy, state, updates)
    read = through_the_disk(first, tmp_path)
    one, other = advance(strategy, first, updates), advance(strategy, read, updates)
    assert all(equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(ServerState))
    for client in (*updates.clients, 77):
        assert equal(strategy.broadcast(one, client), strategy.broadcast(other, client))


@pytest.mark.parametrize("change", [{"x": 1}, {"personal/x/y": 1}, {"global/a.lora_A.weight": 1}, {"diagnostics/q": 1}])
def test_something_else_is_refused(uploads, change):
    named = states.tensors(ServerState(uploads.adapter(0)))
    with pytest.raises(AdapterError):
        states.from_tensors({**(named if "global" not in str(change) else {}), **change}, {"round": 1})
    with pytest.raises(AdapterError, match="this is no server's state"):
        states.from_tensors(named, {})
