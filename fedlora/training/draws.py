"""What dropout draws for several clients in one pass: of each client, what it would draw alone.

On the CPU `dropout` fills a tensor like its input from the default generator, and attention with dropout does the same
with its weights. Here every client has a generator of its own, and draws for its own rows and tokens, in the shapes
that it would have alone. On other devices dropout and products are one kernel, which draws differently for each shape:
there, clients that are trained together draw together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedlora.data.joined import Joined


class CannotShare(Exception):
    """Clients cannot share the passes of a model; says why."""


class OwnDraws(TorchFunctionMode):
    """Within, dropout draws for the clients of `joined` from a generator of each."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.generators = list(generators)
        self.joined: Joined | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.dropout:
            return self._dropout(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or not p:
            return input
        kept = self._kept(input, 1 - p).mul_(1 / (1 - p) if p < 1 else 0)
        return input.mul_(kept) if inplace else input * kept

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        how: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        if not dropout_p:
            return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, **how)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
        plain = torch.ops.aten._scaled_dot_product_attention_math
        weights: Tensor = plain(query, key, value, attn_mask, 0.0, is_causal, **how)[1]
        heads = query.shape[1] // value.shape[1]
        return self._dropout(weights, dropout_p) @ (value.repeat_interleave(heads, 1) if heads > 1 else value)

    def _kept(self, like: Tensor, share: float) -> Tensor:
        """Ones and zeros in the shape of a tensor: what each client would draw alone, and zeros where nothing is a
        client's own."""
        kept = torch.zeros_like(like)
        for part, generator in zip(self._parts(kept), self.generators, strict=True):
            if part.numel():
                part.copy_(torch.empty_like(part).bernoulli_(share, generator=generator))
        return kept

    def _parts(self, values: Tensor) -> list[Tensor]:
        """Each client's own of a tensor of rows × …, rows × tokens × …, or rows × heads × tokens × tokens.

        Raises:
            CannotShare: it is none of these.
        """
        joined = self.joined
        assert joined is not None
        along = {2: (), 3: (1,), 4: (2, 3)}.get(values.ndim)
        rows, tokens = len(joined.batch), joined.tokens
        if along is None or values.shape[0] != rows or any(values.shape[axis] != tokens for axis in along):
            raise CannotShare(
                f"dropout is applied to a tensor of {'×'.join(map(str, values.shape))} numbers for a batch of {rows} "
                f"rows and {tokens} tokens, and which of them are whose is not known"
            )
        parts = []
        for client, (own, length) in enumerate(joined.own):
            part = values.narrow(0, client * joined.rows, own)
            for axis in along:
                part = part.narrow(axis, 0, length)
            parts.append(part)
        return parts


class NoDraws(TorchFunctionMode):
    """Within, nothing is dropped."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.dropout:
            return args[0] if args else (kwargs or {})["input"]
        if func is nn.functional.scaled_dot_product_attention:
            kwargs = {**(kwargs or {}), "dropout_p": 0.0}
        return func(*args, **(kwargs or {}))
