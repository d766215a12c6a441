"""Whether the clients of a run can share the passes of a model, and if not, why: known reasons first, then a trial."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import nn

from fedlora.adapter import EVERY_PART, Adapter, Factors
from fedlora.adapter.weights import parse_name
from fedlora.config import TrainingConfig
from fedlora.data.tokens import Padding
from fedlora.errors import ClientFailed
from fedlora.model.heads import writes
from fedlora.model.resident import ResidentModel
from fedlora.training import client, cohort
from fedlora.training.batched import unknown_layer
from fedlora.training.cohort import Member
from fedlora.training.draws import CannotShare, NoDraws

_SMALL = {"fp32": 1e-3, "bf16": 0.1}
"""Of a client's gradient: far above rounding, far below what other clients' rows make of it."""
_MIXES = re.compile(r"BatchNorm|InstanceNorm")


def why_alone(model: ResidentModel) -> str:
    """Why clients of this model are trained one by one, where that is known beforehand; empty where nothing is."""
    return next(_reasons(model), "")


def _reasons(model: ResidentModel) -> Iterator[str]:
    layers = dict(model.peft.get_base_model().named_modules())
    if model.dtype == "fp16":
        yield "model.dtype=fp16 scales each client's loss by itself"
    if any(parse_name(name).kind.startswith("hira") for name in model.places()):
        yield "HiRA multiplies each client's product with the whole weight, and there is nothing to share"
    if found := unknown_layer(model):
        yield f"'{found[0]}' is a {found[1]}, which is not known for several clients"
    if mixing := next((name for name, layer in layers.items() if _MIXES.search(type(layer).__name__)), None):
        yield f"'{mixing}' is a {type(layers[mixing]).__name__}, in which the rows of a batch see each other"
    if any(type(getattr(layer, "weight", None)).__name__ == "Int8Params" for layer in layers.values()):
        yield "model.quantization=int8 rounds a row by what other rows of its batch hold"
    if _learns_words(model):
        yield "the output layer is adapted, which sees trained tokens alone, and clients have them in unlike numbers"
    if model.device.type == "cpu" and _is_checkpointed(layers) and _drops(model, layers):
        yield "model.gradient_checkpointing computes layers again, which on the CPU would draw their dropout anew"


def tried(model: ResidentModel, members: Sequence[Member], padding: Padding) -> str:
    """Why clients cannot share the passes of a model, told by one step of some of them, alone and together; empty where
    they come to the same. On the CPU with dropout as in training, elsewhere without any."""
    training = TrainingConfig(
        local_steps=1, batch_size=64, optimizer="sgd", learning_rate=1.0, warmup_steps=0, max_grad_norm=None
    )
    before = torch.default_generator.get_state()
    with nullcontext() if model.device.type == "cpu" else NoDraws():
        try:
            together = cohort.train(model, members, training, EVERY_PART, padding)
            moved = not torch.equal(before, torch.default_generator.get_state())
            alone = [
                client.train(model, each.start, each.examples, training, each.turn, EVERY_PART, padding)
                for each in members
            ]
        except ClientFailed:
            return "it was to be tried, and one step alone diverged"
        except CannotShare as error:
            return str(error)
        except (RuntimeError, ValueError, IndexError) as error:
            return f"a batch of several clients ends in {type(error).__name__}: {str(error).splitlines()[0]}"
    if moved and model.device.type == "cpu":
        return "it draws random numbers by other means than dropout"
    for each, one, other in zip(members, alone, together, strict=True):
        if isinstance(other, ClientFailed) or not _alike(each.start, one.adapter, other.adapter, _SMALL[model.dtype]):
            return "a step of several clients together is not what each takes alone"
    return ""


def awake(adapter: Adapter, seed: int) -> Adapter:
    """An adapter whose every factor has a gradient, for a trial: a fresh one has B = 0."""
    g = torch.Generator().manual_seed(seed)
    size = 0.02
    return adapter.with_factors(
        {
            module: Factors(pair.B + size * torch.randn(pair.B.shape, generator=g), pair.A)
            for module, pair in adapter.factors.items()
        }
    )


def _alike(start: Adapter, one: Adapter, other: Adapter, small: float) -> bool:
    """Whether two adapters moved alike, in all that is trained, but for a small share."""
    begun, a, b = (each.tensors() for each in (start, one, other))
    moved = sum(float((a[name] - begun[name]).square().sum()) for name in a)
    apart = sum(float((a[name] - b[name]).square().sum()) for name in a)
    return bool(apart <= small**2 * moved)


def _learns_words(model: ResidentModel) -> bool:
    network = model.peft.get_base_model()
    if not writes(network):
        return False
    output = network.get_output_embeddings()
    return any(network.get_submodule(module) is output for module in model.factors())


def _is_checkpointed(layers: dict[str, nn.Module]) -> bool:
    return any(getattr(layer, "gradient_checkpointing", False) is True for layer in layers.values())


def _drops(model: ResidentModel, layers: dict[str, nn.Module]) -> bool:
    """Whether there is dropout, of layers or, as configurations call it, of attention."""
    declared = model.peft.config.to_dict() if hasattr(model.peft.config, "to_dict") else {}
    named = (value for key, value in declared.items() if "drop" in key and isinstance(value, float))
    return any(named) or any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in layers.values())
