"""PEFT's own arithmetic as second oracle: `add_weighted_adapter`, and what its layers hold after merging.

One module is a Linear (weight d_out × d_in), the other a Conv1D (weight d_in × d_out), both square and not, so that a
transposed update cannot pass.
"""

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapter import Adapter, Factors
from fedlora.adapter.divergence import measure
from fedlora.adapter.updates import Update, Updates
from fedlora.model.resident import add_to_weight
from fedlora.strategies import registry
from fedlora.strategies.base import ServerState
from fedlora.strategies.step import advance

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")

RANK, ALPHA, EXAMPLES = 2, 6, (5, 2, 13)
SIZES = {"linear": (7, 5), "conv": (6, 9), "square_linear": (8, 8), "square_conv": (8, 8)}
MODULES = list(SIZES)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(5, 7, bias=False), Conv1D(6, 9)
        self.square_linear, self.square_conv = nn.Linear(8, 8, bias=False), Conv1D(8, 8)

    def forward(self, x):
        raise NotImplementedError


@pytest.fixture
def model():
    """A PEFT model with one adapter for each client, of random factors."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, fan_in_fan_out=False)
    model = peft.get_peft_model(Net(), config, adapter_name="client0")
    for client in range(1, len(EXAMPLES)):
        model.add_adapter(f"client{client}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.fixture
def updates(model) -> Updates:
    adapters = [
        Adapter.from_tensors(peft.get_peft_model_state_dict(model, adapter_name=f"client{client}"))
        for client in range(len(EXAMPLES))
    ]
    return Updates.collect(Update(u, n, a) for u, (n, a) in enumerate(zip(EXAMPLES, adapters, strict=True)))


@pytest.fixture
def state(updates) -> ServerState:
    zero = {m: Factors(torch.zeros_like(f.B), f.A) for m, f in updates.adapters[0].factors.items()}
    return ServerState(Adapter(zero), scaling=ALPHA / RANK)


def combined(model, kind, **options):
    """PEFT's weighted combination of the clients' adapters, by module as d_out × d_in."""
    shares = [n / sum(EXAMPLES) for n in EXAMPLES]
    names = [f"client{client}" for client in range(len(EXAMPLES))]
    model.add_weighted_adapter(names, shares, "combined", combination_type=kind, **options)
    return {m: oriented(m, layer(model, m).get_delta_weight("combined")) for m in MODULES}


def layer(model, module):
    return model.base_model.model.get_submodule(module)


def oriented(module, weight):
    """As d_out × d_in, however the layer stores it."""
    found = weight.detach().double().numpy()
    found = found.T if "conv" in module else found
    assert found.shape == SIZES[module]
    return found


def test_cat_is_the_mean_product(model, updates):
    """And the stack that flora sends, and the sum of what oracle and fedex-lora keep and merge."""
    wanted = combined(model, "cat")
    for module in MODULES:
        pair = updates.mean_product(module).factors()
        np.testing.assert_allclose(ALPHA / RANK * pair.product().numpy(), wanted[module], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "oracle"])
def test_exact_strategies_hold_what_cat_holds(model, updates, state, name):
    wanted, new = combined(model, "cat"), advance(registry.make(name), state, updates)
    for module in MODULES:
        held = new.scaling * new.adapter.factors[module].product() + new.base_step.modules[module].product()
        np.testing.assert_allclose(held.numpy(), wanted[module], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["svd", "flexlora"])
def test_svd_is_the_truncation(model, updates, state, name):
    wanted = combined(model, "svd", svd_rank=RANK)
    new = advance(registry.make(name), state, updates)
    for module in MODULES:
        held = new.scaling * new.adapter.factors[module].product().numpy()
        np.testing.assert_allclose(held, wanted[module], rtol=1e-4, atol=1e-4)


def test_fedit_is_neither(model, updates, state):
    """So that the tests above can fail."""
    wanted, new = combined(model, "cat"), advance(registry.make("fedit"), state, updates)
    hat = [new.adapter] * len(updates)
    for module in MODULES:
        held = new.scaling * new.adapter.factors[module].product().numpy()
        rho = np.linalg.norm(held - wanted[module]) / np.linalg.norm(wanted[module])
        assert measure(updates, hat).modules[module].rho == pytest.approx(rho, rel=1e-4)
        assert rho > 0.3


@pytest.mark.parametrize("name", ["flora", "fedex-lora", "oracle"])
def test_merged_weights_are_the_base_and_the_mean_product(model, updates, state, name):
    """W0 + W* in the layers themselves: the base update added as fedlora adds it, the adapter merged by PEFT."""
    before = {m: oriented(m, layer(model, m).get_base_layer().weight) for m in MODULES}
    mean = combined(model, "cat")
    new = advance(registry.make(name), state, updates)
    for module in MODULES:
        with torch.no_grad():
            add_to_weight(layer(model, module).get_base_layer(), new.base_step.modules[module])
    peft.set_peft_model_state_dict(model, new.adapter.tensors(), adapter_name="client0")
    model.set_adapter("client0")
    merged = model.merge_and_unload()
    for module in MODULES:
        found = oriented(module, merged.get_submodule(module).weight)
        np.testing.assert_allclose(found, before[module] + mean[module], rtol=1e-4, atol=1e-4)
        if SIZES[module][0] == SIZES[module][1]:
            assert np.abs(found - before[module] - mean[module].T).max() > 0.1
