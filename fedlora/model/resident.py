"""The base model that stays in memory: the tensors of one attached adapter are overwritten for every client.

A base that a strategy changes is brought up to date from its pre-trained weights and the whole base update, so that it
depends on the state alone and not on which rounds a worker has seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedlora import seeds
from fedlora.adapter.base_update import BaseUpdate
from fedlora.adapter.factors import fresh_factors, is_identity
from fedlora.adapter.weights import EVERY_PART, PEFT_PREFIX, Adapter, Factors, Part, full_core, parse_name
from fedlora.config import ModelConfig
from fedlora.config.lora import LoraConfig
from fedlora.errors import ModelError
from fedlora.model import peftlibrary
from fedlora.model.arithmetic import (
    DTYPES,
    autocast,
    cannot_keep_less,
    check_unpacking,
    is_packed,
    packed_inputs,
    placed,
    plain_weight,
)
from fedlora.model.heads import NOTE, PooledClassifier, head_modules, writes
from fedlora.model.targets import (
    check_sides,
    no_place_for_core,
    only_conv1d,
    stores_transposed,
    target_modules,
    tied_to,
    would_change_both,
)
from fedlora.objective.base import Objective

STORED = torch.float32
"""The precision that adapters are read, kept and sent in."""


class ResidentModel:
    """A base model in memory with one adapter attached, at the highest rank; adapters of a lower rank are loaded into
    its first indices, with zeros behind them, which have no gradient."""

    def __init__(
        self, objective: Objective, model: Any, config: ModelConfig, labels: Sequence[str], device: torch.device
    ) -> None:
        self.objective, self.labels = objective, labels
        self.peft = model.to(device)
        self.device = device
        self.name, self.dtype = config.name, config.dtype
        self._handles = _handles(model)
        self._cores: dict[str, _Core] = {}
        self._base: Hashable = None
        self._pristine: dict[str, Tensor] = {}
        self._beside: list[Any] = []

    @classmethod
    def build(
        cls,
        objective: Objective,
        config: ModelConfig,
        lora: LoraConfig,
        labels: Sequence[str],
        pad_token_id: int | None,
        seed: int,
        device: torch.device,
    ) -> ResidentModel:
        """Load the base of an objective, attach a fresh adapter drawn by `seed` (A random, B zero), and move both
        to the device.

        Raises:
            ModelError: the model cannot be loaded, or the adapter does not fit it.
        """
        peft = peftlibrary.load()
        with placed(config, device):
            base: Any = objective.load(config, labels, pad_token_id, seed)
        check_unpacking(config, device.type, packed_inputs(base))
        peft_config = _peft_config(base, lora, objective.task_type(base))
        seeds.seed_torch(seed, "adapter")
        with warnings.catch_warnings():  # PEFT asks a decoder by a name that Transformers is about to give up
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            adapted = peft.get_peft_model(base, peft_config)
        if config.gradient_checkpointing:
            _keep_less(base, config)
        resident = cls(objective, adapted, config, labels, device)
        resident._start_embeddings()
        resident._check_rank(lora)
        return resident

    @property
    def note(self) -> str:
        """What a person should know: what was done about the checkpoint's own head, that it will be slow, that tied
        weights cannot be merged; empty where there is nothing."""
        tied = (
            f"{module} is adapted and shares its weight with {other}, which `fedlora merge` refuses: keep the adapter "
            "beside the base"
            for module, other in self._tied()
        )
        slow = self.dtype == "fp16" and self.device.type == "cpu"
        half = "model.dtype=fp16 on a CPU is several times slower than fp32 and bf16" if slow else ""
        return "; ".join(filter(None, (getattr(self.peft.get_base_model(), NOTE, ""), half, *tied)))

    def _start_embeddings(self) -> None:
        """A random and B zero, as for every other layer: PEFT has it the other way round for embeddings, and what
        trains B alone would learn nothing beside A = 0."""
        live = Adapter.from_tensors(self._handles)
        with torch.no_grad():
            for module, kind in live.kinds.items():
                if kind in ("embedding", "hira_embedding"):
                    pair = live.factors[module]
                    fresh = fresh_factors(pair.shape, pair.rank, kind)
                    pair.A.copy_(fresh.A)
                    pair.B.copy_(fresh.B)

    def _check_rank(self, lora: LoraConfig) -> None:
        for module, pair in self.factors().items():
            check_sides(lora, module, pair.shape)

    def load(self, adapter: Adapter) -> None:
        """Overwrite the attached adapter and head with `adapter`; what it does not reach of the rank becomes zero."""
        live = self.factors()
        padded = adapter.with_factors({m: pair.at_rank(live[m].rank) for m, pair in adapter.factors.items()})
        with torch.no_grad():
            for name, tensor in padded.tensors(EVERY_PART - {"core"}).items():
                self._handles[name].copy_(tensor)
        for module in self._cores.keys() - adapter.cores.keys():
            self._cores.pop(module).remove()
        for module, core in adapter.cores.items():
            if module not in self._cores:
                self._cores[module] = _Core(module, self._layer(module))
            self._cores[module].load(core.to(self.device))

    def read(self) -> Adapter:
        """A copy of the attached adapter and head, in fp32 on the CPU."""
        copies = {name: p.detach().to("cpu", STORED, copy=True) for name, p in self._handles.items()}
        cores = {m: core.read().to("cpu", STORED, copy=True) for m, core in self._cores.items()}
        return replace(Adapter.from_tensors(copies), cores=cores)

    def places(self) -> dict[str, tuple[nn.Module, str]]:
        """The module that each of the adapter's and head's parameters is an attribute of, and which; by the names under
        which PEFT saves them."""
        owned = {
            id(parameter): (module, attribute)
            for module in self.peft.modules()
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        }
        return {name: owned[id(parameter)] for name, parameter in self._handles.items()}

    @contextmanager
    def cores_as(self, apply: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Within, `apply(module, output of A)` stands for what the module's core makes of it."""
        for module, core in self._cores.items():
            core.instead = partial(apply, module)
        try:
            yield
        finally:
            for core in self._cores.values():
                core.instead = None

    def factors(self) -> dict[str, Factors]:
        """The attached factors themselves, by module: they train when the adapter does."""
        return dict(Adapter.from_tensors(self._handles).factors)

    def trainable(self, parts: frozenset[Part]) -> list[nn.Parameter]:
        """Freeze everything but `parts` of the adapter, and return their parameters."""
        chosen = []
        for name, parameter in self._handles.items():
            parameter.requires_grad_(parse_name(name).part in parts)
            if parameter.requires_grad:
                chosen.append(parameter)
        for core in self._cores.values():
            chosen += core.trainable("core" in parts)
        return chosen

    def base_weight(self, module: str) -> Tensor:
        """The base weight of a module as d_out × d_in, however the layer stores it, in fp32 on the CPU."""
        layer = self._layer(module).get_base_layer()
        weight = plain_weight(layer).to("cpu", torch.float32)
        return weight.T if stores_transposed(layer) else weight

    def check_untied(self) -> None:
        """Refuse a base in which an adapted module shares its weight with another: what changes one changes both.

        Raises:
            ModelError: names both.
        """
        for module, tied in self._tied():
            raise would_change_both(module, tied)

    def _tied(self) -> Iterator[tuple[str, str]]:
        """The adapted modules whose weight is another's too, and which."""
        layers = dict(self.peft.get_base_model().named_modules())
        for module in self.factors():
            if (tied := tied_to(layers, self._layer(module).get_base_layer())) is not None:
                yield module, tied

    def set_base(self, update: BaseUpdate, version: Hashable) -> None:
        """Bring the frozen base to its pre-trained weights plus `update`; nothing is done if it is at `version`.

        An empty update is the pre-trained base. Layers of a bf16 base that change are in fp32 while they do, so that
        small updates are not rounded away. Of a quantised layer the weight stays, and the update is applied beside it.
        """
        wanted = version if update else None
        if wanted == self._base:
            return
        with torch.no_grad():
            for module in list(self._pristine):
                self._layer(module).get_base_layer().weight.data = self._pristine.pop(module)
            while self._beside:
                self._beside.pop().remove()
            for module, pair in update.modules.items():
                layer = self._layer(module).get_base_layer()
                if is_packed(layer):
                    self._beside.append(apply_beside(layer, pair))
                    continue
                self._pristine[module] = layer.weight.data
                layer.weight.data = layer.weight.data.to(torch.float32, copy=True)
                add_to_weight(layer, pair)
        self._base = wanted

    def _layer(self, module: str) -> Any:
        """PEFT's layer of an adapted module."""
        return self.peft.get_base_model().get_submodule(module)

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic of the configured precision."""
        return autocast(self.device, DTYPES[self.dtype])

    def peft_config(self) -> dict[str, Any]:
        """The content of `adapter_config.json` for the attached adapter."""
        content = self.peft.peft_config["default"].to_dict()
        content |= {"inference_mode": True, "base_model_name_or_path": self.name}
        return {
            key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
            for key, value in content.items()
        }


class _Core:
    """A trained matrix between a module's A and B, applied to what A puts out.

    Of h heads the diagonal blocks are trained, each with a factor that starts at one and is multiplied in at the end
    (arXiv 2506.05568).
    """

    def __init__(self, module: str, layer: Any) -> None:
        if "default" not in getattr(layer, "lora_A", {}):
            raise no_place_for_core(module)
        self._core = self._gates = nn.Parameter(torch.empty(0))
        self.instead: Callable[[Tensor], Tensor] | None = None
        self._hook = layer.lora_A["default"].register_forward_hook(self._apply)

    def load(self, core: Tensor) -> None:
        self._core = nn.Parameter(core.clone())
        self._gates = nn.Parameter(core.new_ones(len(core) if core.ndim == 3 else 0))

    def read(self) -> Tensor:
        return (self._core if self._core.ndim == 2 else self._core * self._gates[:, None, None]).detach()

    def trainable(self, wanted: bool) -> list[nn.Parameter]:
        both = [self._core] if self._core.ndim == 2 else [self._core, self._gates]
        for parameter in both:
            parameter.requires_grad_(wanted)
        return both if wanted else []

    def remove(self) -> None:
        self._hook.remove()

    def _apply(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self.instead is not None:
            return self.instead(output)
        core = self._core if self._core.ndim == 2 else self._core * self._gates[:, None, None]
        return output @ full_core(core).to(output.dtype).T


def add_to_weight(layer: Any, pair: Factors) -> None:
    """Add `left @ right` (d_out × d_in) to a layer's weight in place, however the layer stores it."""
    left, right = (side.to(layer.weight.device, torch.float32) for side in (pair.B, pair.A))
    delta = right.T @ left.T if stores_transposed(layer) else left @ right
    layer.weight.data.add_(delta.to(layer.weight.dtype))


def apply_beside(layer: Any, pair: Factors) -> Any:
    """Add `left @ right` (d_out × d_in) to what a linear layer computes, and leave its weight alone.

    Returns a handle with `remove()`.
    """
    sides = [side.to(layer.weight.device, torch.float32) for side in (pair.A, pair.B) if not is_identity(side)]

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = inputs[0].to(sides[0].dtype)
        for side in sides:
            change = nn.functional.linear(change, side)
        return output + change.to(output.dtype)

    return layer.register_forward_hook(add)


def _keep_less(base: Any, config: ModelConfig) -> None:
    """Gradient checkpointing: layers keep what enters them, and are computed again for the gradients."""
    body = base.encoder if isinstance(base, PooledClassifier) else base
    try:
        with warnings.catch_warnings():  # it has another name in the next Transformers
            warnings.simplefilter("ignore", FutureWarning)
            body.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise cannot_keep_less(config.name) from error
    if not writes(base):  # what writes is told each time, and needs it to write
        body.config.use_cache = False


def _peft_config(base: Any, lora: LoraConfig, task_type: str | None) -> Any:
    peft = peftlibrary.load()
    targets = target_modules(base, lora)
    common: dict[str, Any] = {
        "r": lora.highest_rank,
        "target_modules": targets,
        "fan_in_fan_out": only_conv1d(base, targets),  # PEFT would find out, with a warning for every layer
        "modules_to_save": head_modules(base) or None,
        "task_type": task_type,
    }
    if lora.variant == "hira":
        return peft.HiraConfig(hira_dropout=lora.dropout, **common)
    return peft.LoraConfig(
        lora_alpha=lora.alpha_at(lora.highest_rank),  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_rslora=lora.variant == "rslora",
        use_dora=lora.variant == "dora",
        **common,
    )


def _handles(model: Any) -> dict[str, nn.Parameter]:
    """The adapter's and head's live parameters by the names under which PEFT saves them."""
    handles = {_saved_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    saved = set(peftlibrary.load().get_peft_model_state_dict(model, save_embedding_layers=False))
    if saved != handles.keys():
        odd = sorted(saved ^ handles.keys())[0]
        raise ModelError(
            f"parameter '{odd.removeprefix(PEFT_PREFIX)}' is trained but not saved by PEFT, or the reverse"
        )
    return handles


def _saved_name(name: str) -> str:
    """A live parameter's name as PEFT saves it: without the adapter's own name in it."""
    bare = name.replace(".modules_to_save.default", "")
    if bare.endswith(".lora_magnitude_vector.default.weight"):
        return bare.removesuffix(".default.weight")
    return bare.replace(".default.weight", ".weight").removesuffix(".default")
