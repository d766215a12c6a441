"""The part of a configuration that describes the frozen base model."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from fedlora.sections import Section


class ModelConfig(Section):
    """The frozen base model."""

    name: str = "bert-tiny"
    """A packaged model (`fedlora models`), a Hugging Face id, or a local folder."""
    pooling: Literal["auto", "mean", "cls", "head"] = "auto"
    """How tokens become one vector: `mean` or `cls` (with a fresh linear classifier on top), or `head`, the
    architecture's own classification head. `auto` takes what the model was trained with: the pooling a sentence encoder
    declares, otherwise its own head."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the frozen base and its arithmetic. Adapters and heads are always trained and sent in fp32. With
    `fp16` the loss is scaled, so that small gradients survive; on a CPU it is several times slower than the others."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """The frozen base's linear layers in 8 or 4 bits (bitsandbytes, extra `quantized`), unpacked to `dtype` for every
    product; embeddings, output layer and heads stay in `dtype`. A strategy that changes the base has its changes beside
    the layers, exactly."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer, and compute the rest again for the gradients: less memory, a third more time,
    the same numbers."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """How attention is computed. `auto`: as Transformers chooses for the model. `flash_attention_2` needs its package,
    a GPU, and `dtype` bf16 or fp16."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id; empty for the default branch."""
    trust_remote_code: bool = False
    """Run the Python files that a model brings along, with all your rights, where it needs them. A model that does is
    refused otherwise. Read them first, and set `revision` to the commit that you have read."""

    @model_validator(mode="after")
    def _possible_together(self) -> ModelConfig:
        if self.attention == "flash_attention_2" and self.dtype == "fp32":
            raise ValueError("attention=flash_attention_2 computes in bf16 or fp16; set model.dtype to one of these")
        return self
