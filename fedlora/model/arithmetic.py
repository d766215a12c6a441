"""How a base model computes: its precision, whether its weights are quantised, which attention; where that works."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedlora.config import ModelConfig
from fedlora.errors import ModelError
from fedlora.model import peftlibrary

N = TypeVar("N", bound=nn.Module)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PACKED = ("Params4bit", "Int8Params")
"""What bitsandbytes calls weights that it has quantised."""
_REPACKS = "support_avx512bf16_for_cpu"
"""Of a layer of bitsandbytes: whether it may bring its weight into a form that is for inference alone."""
_BLOCK = 64
"""Weights of nf4 with one scale."""


def check(config: ModelConfig, devices: Iterable[str]) -> None:
    """Refuse what some of these devices, or this installation, cannot do.

    Raises:
        ModelError: names the key, the value and what to do.
    """
    kinds = {device.partition(":")[0] for device in devices}
    if config.quantization != "none":
        key = f"model.quantization={config.quantization}"
        if find_spec("bitsandbytes") is None:
            raise ModelError(f"{key} needs bitsandbytes; install it: pip install 'fedlora[quantized]'")
        if other := kinds - {"cpu", "cuda"}:
            raise ModelError(f"{key} works on the CPU and on GPUs of CUDA, not on {other.pop()}; set runner.device=cpu")
    if config.attention == "flash_attention_2":
        from transformers.utils import is_flash_attn_2_available

        if kinds != {"cuda"} or not is_flash_attn_2_available():
            why = "its package flash-attn is not installed" if kinds == {"cuda"} else "it needs a GPU of CUDA"
            raise ModelError(f"model.attention=flash_attention_2 is not to be had here: {why}; use sdpa")


def loading(config: ModelConfig, keep: Iterable[str] = ()) -> dict[str, Any]:
    """What `from_pretrained` is told of it.

    Args:
        config: of the model.
        keep: modules that are not to be quantised, besides the output layer: heads that are trained.
    """
    dtype = DTYPES[config.dtype]
    how: dict[str, Any] = {"dtype": dtype}
    if config.attention != "auto":
        how["attn_implementation"] = config.attention
    if config.quantization == "none":
        return how
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for every product in int8
    kept = [*keep] or None
    packed = (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
        if config.quantization == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
        )
    )
    return {**how, "quantization_config": packed, "device_map": {"": torch.get_default_device()}}


def trained_as_scored(network: N) -> N:
    """The network itself, whose layers of 4 bits keep the form that they can be trained in.

    On a CPU with arithmetic for bf16, bitsandbytes brings them into another form when they are first used without being
    trained, and from then on no gradient passes them, without a word.
    """
    for layer in network.modules():
        if hasattr(layer, _REPACKS):
            setattr(layer, _REPACKS, False)
    return network


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """What a model computes in, training, judging and writing alike: products in a narrow precision if its base is in
    one, whatever the precision of the adapter."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def cannot_keep_less(name: str) -> ModelError:
    """Why a model cannot have gradient checkpointing, as an error to raise."""
    return ModelError(
        f"model.gradient_checkpointing=true, but the architecture of model.name={name} has none in Transformers; leave "
        "it out"
    )


def check_unpacking(config: ModelConfig, device: str, inputs: Mapping[str, int]) -> None:
    """Refuse 4 bits on a CPU for layers that bitsandbytes unpacks wrongly there, without a word: it takes each row to
    begin a block of its own, though blocks run on.

    Args:
        config: of the model.
        device: that it is for.
        inputs: d_in of every layer that is quantised.

    Raises:
        ModelError: a layer's rows are not whole blocks.
    """
    if config.quantization != "nf4" or not device.startswith("cpu"):
        return
    for name, d_in in inputs.items():
        if d_in % _BLOCK:
            raise ModelError(
                f"model.quantization=nf4 on the CPU: bitsandbytes unpacks '{name}' wrongly, whose {d_in} inputs are no "
                f"multiple of {_BLOCK}; set model.quantization=int8, or runner.device=cuda where there is one"
            )


def packed_inputs(network: nn.Module) -> dict[str, int]:
    """How many inputs every quantised layer has."""
    return {name: int(layer.in_features) for name, layer in network.named_modules() if is_packed(layer)}  # type: ignore[arg-type]


def placed(config: ModelConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Where a model is loaded within: quantised weights where they will stay, others in the machine's memory."""
    return device if config.quantization != "none" else nullcontext()


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer's weight is quantised."""
    return type(getattr(layer, "weight", None)).__name__ in _PACKED


def plain_weight(layer: Any) -> Tensor:
    """A layer's weight, unpacked where it is quantised."""
    if is_packed(layer):
        unpacked: Tensor = peftlibrary.load().utils.integrations.dequantize_module_weight(layer)
        return unpacked.detach()
    weight: Tensor = layer.weight
    return weight.detach()


def parameters(network: nn.Module) -> int:
    """How many numbers a network has, also where several share a byte."""
    return sum(_numbers(parameter) for parameter in network.parameters())


def _numbers(parameter: Any) -> int:
    packed = type(parameter).__name__ == "Params4bit"
    return int(parameter.quant_state.shape.numel()) if packed else int(parameter.numel())
