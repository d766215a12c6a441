"""What adapters from anyone are brought to before they are combined: one scaling by module, one order of token rows.

A client's update of a module is `s_u·B_u·A_u`; with s for all it is `s·(B_u·s_u/s)·A_u`, the same product. PEFT keeps
the rows of single tokens (`trainable_token_indices`) as they are after training, not as changes: a client that has not
trained a token holds the base's row of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.adapter import Adapter, Factors
from fedlora.errors import AdapterError
from fedlora.exchange.peftfolder import TOKENS, PeftFolder
from fedlora.files.limits import OWN, clean
from fedlora.files.tensorfile import StoredTensors

_SAME = 1e-9
"""Scalings that differ by less are one: alphas are written in decimals."""


@dataclass(frozen=True)
class Alignment:
    """How clients' adapters were made comparable.

    `scalings` are the s of every module in the result; `ratios[client]` is s_u/s of the modules in which a client's
    differs, taken up by its factor `part`; `tokens` the tokens of every tensor of rows in the result, empty where each
    client keeps its own.
    """

    scalings: Mapping[str, float]
    ratios: tuple[Mapping[str, float], ...]
    part: Literal["A", "B"] = "B"
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def mixed(self) -> bool:
        """Whether clients have different scalings."""
        return any(self.ratios)

    def own(self, client: int, adapter: Adapter) -> Adapter:
        """What a client goes on with, in its own scaling: the inverse of what was done to its upload."""
        ratios = self.ratios[client]
        if not ratios:
            return adapter
        factors = dict(adapter.factors)
        for module, ratio in ratios.items():
            pair = factors[module]
            other = pair.A if self.part == "B" else pair.B
            factors[module] = _times(pair, 1 / ratio, self.part, other.dtype)
        return adapter.with_factors(factors)

    def own_scalings(self, client: int) -> Mapping[str, float]:
        """A client's own s, by module."""
        return {module: s * self.ratios[client].get(module, 1.0) for module, s in self.scalings.items()}


def ratios_of(clients: Sequence[PeftFolder], scalings: Mapping[str, float]) -> tuple[Mapping[str, float], ...]:
    """s_u/s of the modules in which a client's scaling is not s, for every client."""
    return tuple(
        {
            module: own / scalings[module]
            for module, own in client.scalings.items()
            if not math.isclose(own, scalings[module], rel_tol=_SAME)
        }
        for client in clients
    )


def aligned(
    clients: Sequence[PeftFolder], weights: Sequence[float], alignment: Alignment, base: Any = None
) -> list[Adapter]:
    """The clients' adapters, in the result's scalings and with the result's rows; read when they are looked at.

    Args:
        clients: their folders.
        weights: theirs; a client without one needs no row that it lacks.
        alignment: see there.
        base: the base model (`base_rows`), or None.

    Raises:
        AdapterError: a client lacks the row of a token that others have trained, and there is no base to take it from.
    """
    found = []
    known: dict[str, dict[int, Tensor]] = {name: {} for name in alignment.tokens}
    for client, weight, ratios in zip(clients, weights, alignment.ratios, strict=True):
        adapter = client.adapter
        if ratios:
            adapter = adapter.with_factors(_Scaled(adapter.factors, ratios, alignment.part))
        if any(client.tokens.get(name) != rows for name, rows in alignment.tokens.items()):
            if weight:
                _learn(client, alignment.tokens, known, base)
            adapter = replace(adapter, head=_Head(client, alignment.tokens, known))
        found.append(adapter)
    return found


def union_of_tokens(clients: Sequence[PeftFolder], weights: Sequence[float]) -> dict[str, tuple[int, ...]]:
    """The tokens of every tensor of rows that a client with a weight has trained: in the clients' order where they have
    the same, otherwise ascending."""
    counted = [client for client, weight in zip(clients, weights, strict=True) if weight]
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted({name for client in counted for name in client.tokens}):
        lists = [client.tokens.get(name, ()) for client in counted]
        found[name] = lists[0] if len(set(lists)) == 1 else tuple(sorted({token for rows in lists for token in rows}))
    return found


class _Scaled(Mapping[str, Factors]):
    """Factors of which one takes up a ratio, in float64; those of other modules are what they were."""

    def __init__(self, factors: Mapping[str, Factors], ratios: Mapping[str, float], part: Literal["A", "B"]) -> None:
        self._factors, self._ratios, self._part = factors, ratios, part

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        known: Mapping[str, int] | None = getattr(self._factors, "ranks", None)
        return known if known is not None else {module: pair.rank for module, pair in self._factors.items()}

    def __getitem__(self, module: str) -> Factors:
        pair = self._factors[module]
        ratio = self._ratios.get(module)
        return pair if ratio is None else _times(pair, ratio, self._part, torch.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)


def _times(pair: Factors, ratio: float, part: Literal["A", "B"], dtype: torch.dtype) -> Factors:
    if part == "B":
        return Factors((ratio * pair.B.double()).to(dtype), pair.A)
    return Factors(pair.B, (ratio * pair.A.double()).to(dtype))


class _Head(Mapping[str, Tensor]):
    """A client's head with the rows of the result's tokens: its own where it has them, elsewhere those that are known,
    or zeros for a client that does not count."""

    def __init__(
        self, client: PeftFolder, tokens: Mapping[str, tuple[int, ...]], known: Mapping[str, Mapping[int, Tensor]]
    ) -> None:
        self._client, self._tokens, self._known = client, tokens, known
        self._names = sorted({*client.adapter.head, *tokens} - (client.tokens.keys() - tokens.keys()))

    def __getitem__(self, name: str) -> Tensor:
        own = self._client.adapter.head
        if name not in self._tokens:
            return own[name]
        rows: dict[int, Tensor] = dict(self._known[name])
        if name in own:
            rows |= zip(self._client.tokens[name], own[name].double(), strict=True)
        blank = torch.zeros_like(next(iter(rows.values())))
        return torch.stack([rows.get(token, blank) for token in self._tokens[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _learn(
    client: PeftFolder, tokens: Mapping[str, tuple[int, ...]], known: Mapping[str, dict[int, Tensor]], base: Any
) -> None:
    """Have the base's rows of the tokens that a client has not trained: from its own file where PEFT put the whole
    embedding there, otherwise from the base."""
    for name, wanted in tokens.items():
        own = set(client.tokens.get(name, ()))
        missing = [token for token in wanted if token not in own and token not in known[name]]
        if not missing:
            continue
        module = name.removesuffix(TOKENS)
        saved = f"{module}.token_adapter.base_layer.weight"
        if saved in client.adapter.head:
            rows = _chosen(client.adapter.head[saved], missing, f"{client.path}: tensor '{saved}'")
        elif base is None:
            raise AdapterError(
                f"{client.path} has not trained token {missing[0]} of '{module}', which others have; their mean needs "
                "the base model's row of it: give the model's folder or the model (--base, fedlora.aggregate(…, base=))"
            )
        else:
            rows = base_rows(base, module, missing)
        known[name].update(zip(missing, rows.double(), strict=True))


def base_rows(base: Any, module: str, tokens: Sequence[int]) -> Tensor:
    """Rows (tokens × width) of an embedding of the base.

    Args:
        base: a model in memory, or a model folder with safetensors, of which only these rows are read.
        module: the embedding's name in the model.
        tokens: which rows.

    Raises:
        AdapterError: there is no such folder, file or tensor, or it has fewer rows.
    """
    if hasattr(base, "get_submodule"):
        try:
            weight: Tensor = base.get_submodule(module).weight
        except AttributeError:
            raise AdapterError(f"the base model has no module '{module}' with a weight") from None
        return _chosen(weight.detach(), tokens, f"the base model's '{module}'")
    folder = _folder_of(base)
    files = {path: StoredTensors(path, OWN) for path in sorted(folder.glob("*.safetensors"))}
    exact = [(path, name) for path, stored in files.items() for name in stored if name == f"{module}.weight"]
    near = [(path, name) for path, stored in files.items() for name in stored if _same_place(name, module)]
    found = exact or near
    if len(found) != 1:
        state = "several tensors" if found else "no tensor"
        raise AdapterError(f"base {folder} has {state} for '{module}' in its safetensors files; give the model itself")
    path, name = found[0]
    return _chosen(files[path][name], tokens, f"{path}: tensor '{name}'")


def _folder_of(base: Any) -> Path:
    """A model's folder, or that of a hub's model where it has been downloaded."""
    from huggingface_hub import snapshot_download

    try:
        if Path(base).is_dir():
            return Path(base)
        return Path(snapshot_download(str(base), local_files_only=True))
    except Exception:
        raise AdapterError(
            f"base {clean(str(base))} is neither a model folder nor a hub's model that was downloaded (hf download); "
            "give either, or the model itself"
        ) from None


def _same_place(name: str, module: str) -> bool:
    """Whether a checkpoint's tensor is a module's weight, with or without the name of the model's body before it."""
    weight = f"{module}.weight"
    return name.endswith(f".{weight}") or (weight.endswith(f".{name}") and "." in name)


def _chosen(weight: Tensor, tokens: Sequence[int], what: str) -> Tensor:
    if weight.ndim != 2 or max(tokens) >= len(weight):
        raise AdapterError(f"{what} has shape {tuple(weight.shape)}; expected a row of token {max(tokens)}")
    return weight[list(tokens)]
