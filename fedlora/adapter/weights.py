"""LoRA weights as typed values, and the one place that parses parameter names.

A name is taken apart once, at the edge, into a module and a part; nowhere else is A told from B by shape or substring.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from fedlora.errors import AdapterError
from fedlora.files.tensorfile import StoredTensors, serialise

P = TypeVar("P")
V = TypeVar("V")

Part = Literal["A", "B", "core", "magnitude", "head"]
Kind = Literal["linear", "embedding", "hira", "hira_embedding"]
"""How PEFT stores a module's factors: of a linear layer (also Conv1D), of an embedding, and the same for HiRA."""

EVERY_PART: frozenset[Part] = frozenset({"A", "B", "core", "magnitude", "head"})
PEFT_PREFIX = "base_model.model."

_SUFFIXES: dict[Kind, dict[Literal["A", "B"], str]] = {
    "linear": {"A": "lora_A.weight", "B": "lora_B.weight"},
    "embedding": {"A": "lora_embedding_A", "B": "lora_embedding_B"},
    "hira": {"A": "hira_A", "B": "hira_B"},
    "hira_embedding": {"A": "hira_embedding_A", "B": "hira_embedding_B"},
}
_FACTOR_OF: dict[str, tuple[Kind, Literal["A", "B"]]] = {
    suffix: (kind, part) for kind, parts in _SUFFIXES.items() for part, suffix in parts.items()
}
_MAGNITUDE = "lora_magnitude_vector"
_CORE = "lora_core"
"""Our own name: PEFT has no matrix between its factors."""
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put into names, wherever they wrap a module."""
_PARALLEL = re.compile(rf"^(?:module\.)+(?={re.escape(PEFT_PREFIX)})")
"""What DataParallel and DeepSpeed put before names. Behind PEFT's prefix it is a module of the model's own."""
_ADAPTED = re.compile(r"^(?P<module>.+?)\.(?P<suffix>(?:lora|hira)_\w+(?:\.weight)?)$")


class ParameterName(NamedTuple):
    """What a parameter is: part `A`, `B`, `core` or `magnitude` of a module, or `head` with its own name."""

    part: Part
    module: str
    kind: Kind = "linear"


def without_wrappers(name: str) -> str:
    """A PEFT state-dict name as it is without torch.compile, FSDP, DataParallel and the like around modules."""
    return _PARALLEL.sub("", _WRAPPER.sub("", name))


def parse_name(name: str) -> ParameterName:
    """Take a PEFT state-dict name apart, with or without the `base_model.model.` prefix and wrappers.

    Raises:
        AdapterError: a name that says it is an adapter's, but is none of a factor or a DoRA magnitude.
    """
    bare = without_wrappers(name).removeprefix(PEFT_PREFIX)
    match = _ADAPTED.match(bare)
    if match and match["suffix"] in _FACTOR_OF:
        kind, part = _FACTOR_OF[match["suffix"]]
        return ParameterName(part, match["module"], kind)
    if match and match["suffix"].removesuffix(".weight") == _MAGNITUDE:
        return ParameterName("magnitude", match["module"])
    if match and match["suffix"] == _CORE:
        return ParameterName("core", match["module"])
    if ".lora_" not in bare and ".hira_" not in bare:
        return ParameterName("head", bare)
    raise AdapterError(
        f"parameter '{name}' is not understood; expected factors ({', '.join(_FACTOR_OF)}) or {_MAGNITUDE}"
    )


@dataclass(frozen=True)
class Factors:
    """One module's adapter: `B` (d_out × r) and `A` (r × d_in); the module's update is `s·B@A`."""

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise AdapterError(
                f"factors do not fit: B is {tuple(self.B.shape)} and A is {tuple(self.A.shape)}; "
                "expected B (d_out × r) and A (r × d_in)"
            )

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the product."""
        return self.B.shape[0], self.A.shape[1]

    def to(self, dtype: torch.dtype) -> Factors:
        return Factors(self.B.to(dtype), self.A.to(dtype))

    def to_double(self) -> Factors:
        return self.to(torch.float64)

    def product(self) -> Tensor:
        """The dense product `B@A` (d_out × d_in), without the scaling."""
        return self.B @ self.A

    def at_rank(self, rank: int) -> Factors:
        """The first `rank` indices; where there are fewer, zeros behind them (the product is unchanged)."""
        if rank == self.rank:
            return self
        if rank < self.rank:
            return Factors(self.B[:, :rank], self.A[:rank])
        more = rank - self.rank
        return Factors(
            torch.cat([self.B, self.B.new_zeros(self.B.shape[0], more)], dim=1),
            torch.cat([self.A, self.A.new_zeros(more, self.A.shape[1])]),
        )


def full_core(core: Tensor) -> Tensor:
    """A core (r × r) of which only the diagonal blocks may be given (h × r/h × r/h)."""
    return torch.block_diag(*core) if core.ndim == 3 else core  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Adapter:
    """All factors of a model, by module, and the head: every other trained tensor, by name.

    `magnitudes` holds DoRA's vectors (d_out) by module; `kinds` says how PEFT names a module's factors, where it is not
    a plain linear layer. `cores` holds a matrix C between the factors, so that the update is `s·B@C@A`: r × r, or
    h × r/h × r/h for h heads, the blocks of a block-diagonal one.
    """

    factors: Mapping[str, Factors]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    cores: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(sorted(self.factors))

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        known: Mapping[str, int] | None = getattr(self.factors, "ranks", None)  # where they live in files
        ranks = known.values() if known else (factors.rank for factors in self.factors.values())
        return max(ranks, default=0)

    def cut(self, rank: int) -> Adapter:
        """Every module cut to its first `rank` indices; modules of a lower rank stay as they are."""
        return self.with_factors({m: pair.at_rank(min(rank, pair.rank)) for m, pair in self.factors.items()})

    def cut_like(self, other: Adapter) -> Adapter:
        """Every module cut to the rank it has in `other`, where that is lower."""
        ranks = {module: other.factors[module].rank for module in self.factors}
        return self.with_factors({m: pair.at_rank(min(ranks[m], pair.rank)) for m, pair in self.factors.items()})

    def folded(self) -> Adapter:
        """The same update as plain factors: B takes up the core."""
        if not self.cores:
            return self
        factors = {m: Factors(pair.B @ full_core(self.cores[m]), pair.A) for m, pair in self.factors.items()}
        return replace(self, factors=factors, cores={})

    def with_factors(self, factors: Mapping[str, Factors]) -> Adapter:
        """The same head, magnitudes and kinds with other factors."""
        return replace(self, factors=factors)

    def tensors(self, parts: frozenset[Part] = EVERY_PART) -> dict[str, Tensor]:
        """PEFT state-dict names to contiguous tensors, for the parts asked for."""
        return {name: tensor.contiguous() for name, tensor in self._named(parts).items()}

    def _named(self, parts: frozenset[Part]) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for module in self.modules:
            factors, suffixes = self.factors[module], _SUFFIXES[self.kinds.get(module, "linear")]
            if "A" in parts:
                named[f"{PEFT_PREFIX}{module}.{suffixes['A']}"] = factors.A
            if "B" in parts:
                named[f"{PEFT_PREFIX}{module}.{suffixes['B']}"] = factors.B
        if "core" in parts:
            for module in sorted(self.cores):
                named[f"{PEFT_PREFIX}{module}.{_CORE}"] = self.cores[module]
        if "magnitude" in parts:
            for module in sorted(self.magnitudes):
                named[f"{PEFT_PREFIX}{module}.{_MAGNITUDE}"] = self.magnitudes[module]
        if "head" in parts:
            named |= {f"{PEFT_PREFIX}{name}": self.head[name] for name in sorted(self.head)}
        return named

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """PEFT state-dict names to shapes."""
        return {name: tuple(tensor.shape) for name, tensor in self._named(EVERY_PART).items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Adapter:
        """The inverse of `tensors`.

        Raises:
            AdapterError: a module with only one of its factors, shapes that do not fit, no module at all.
        """
        layout = Layout.of(tensors)
        return cls(
            {module: Factors(tensors[b], tensors[a]) for module, (b, a) in layout.factors.items()},
            {bare: tensors[name] for bare, name in layout.head.items()},
            {module: tensors[name] for module, name in layout.magnitudes.items()},
            layout.kinds,
            {module: tensors[name] for module, name in layout.cores.items()},
        )

    @classmethod
    def stored(cls, tensors: StoredTensors, layout: Layout | None = None) -> Adapter:
        """An adapter that lives in a file: every tensor is read each time it is looked at, so that memory holds one
        module of one client at a time.

        Args:
            tensors: the file.
            layout: of its names, where that is known already.

        Raises:
            AdapterError: a module with only one of its factors, shapes that do not fit, no module at all.
        """
        layout = layout or Layout.of(tensors)
        for module, (b, a) in layout.factors.items():
            sides = tensors.shapes[b], tensors.shapes[a]
            if any(len(side) != 2 for side in sides) or sides[0][1] != sides[1][0]:
                raise AdapterError(
                    f"module '{module}': factors do not fit: B is {sides[0]} and A is {sides[1]}; "
                    "expected B (d_out × r) and A (r × d_in)"
                )
        return cls(
            _StoredFactors(layout.factors, tensors),
            _Lazy(layout.head, tensors.__getitem__),
            _Lazy(layout.magnitudes, tensors.__getitem__),
            layout.kinds,
            _Lazy(layout.cores, tensors.__getitem__),
        )

    def check_like(self, other: Adapter, who: str, lower_rank: bool = False) -> None:
        """Refuse an adapter that does not have the modules, shapes and finite values of `other`.

        Args:
            other: what is expected.
            who: whose adapter this is, for the message.
            lower_rank: also accept modules of a lower rank than in `other`.

        Raises:
            AdapterError: naming `who` and the tensor.
        """
        check_shapes(self.shapes(), other.shapes(), who, lower_rank)
        self.check_finite(who, "training diverged?")

    def check_finite(self, who: str, hint: str) -> None:
        """Refuse NaN and infinities with an AdapterError that names `who` and the tensor, with the hint."""
        for name, tensor in self.tensors().items():
            check_finite(name, tensor, who, hint)


def check_finite(name: str, tensor: Tensor, who: str, hint: str = "training diverged?") -> None:
    """Refuse NaN and infinities in one tensor, as `Adapter.check_finite` does."""
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{who}: tensor '{name}' has values that are not finite ({hint})")


class _Lazy(Mapping[str, V], Generic[P, V]):
    """Values made from places whenever they are asked for."""

    def __init__(self, places: Mapping[str, P], make: Callable[[P], V]) -> None:
        self._places, self._make = places, make

    def __getitem__(self, name: str) -> V:
        return self._make(self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _StoredFactors(_Lazy[tuple[str, str], Factors]):
    """Factors in a file, whose ranks are known without reading them."""

    def __init__(self, places: Mapping[str, tuple[str, str]], tensors: StoredTensors) -> None:
        super().__init__(places, lambda names: Factors(*tensors.read(names)))
        self.ranks = {module: tensors.shapes[a][0] for module, (_, a) in places.items()}


@dataclass(frozen=True)
class Layout:
    """Where the parts of an adapter are among named tensors: (B, A) names by module, head and magnitude names."""

    factors: Mapping[str, tuple[str, str]]
    head: Mapping[str, str]
    magnitudes: Mapping[str, str]
    kinds: Mapping[str, Kind]
    cores: Mapping[str, str]

    @classmethod
    def of(cls, names: Iterable[str]) -> Layout:
        """Sort names into parts; those of the last few adapters are remembered, as many clients send the same.

        Raises:
            AdapterError: a module with only one of its factors or named in two manners, no module at all.
        """
        return cls._of(tuple(names))

    @classmethod
    @lru_cache(8)
    def _of(cls, names: tuple[str, ...]) -> Layout:
        halves: dict[str, dict[Literal["A", "B"], str]] = {}
        head: dict[str, str] = {}
        magnitudes: dict[str, str] = {}
        cores: dict[str, str] = {}
        kinds: dict[str, Kind] = {}
        for name in names:
            parsed = parse_name(name)
            if parsed.part == "head":
                head[parsed.module] = name
            elif parsed.part == "magnitude":
                magnitudes[parsed.module] = name
            elif parsed.part == "core":
                cores[parsed.module] = name
            else:
                if kinds.setdefault(parsed.module, parsed.kind) != parsed.kind:
                    raise AdapterError(f"module '{parsed.module}' has factors of two kinds")
                halves.setdefault(parsed.module, {})[parsed.part] = name
        for module, parts in halves.items():
            for part, suffix in _SUFFIXES[kinds[module]].items():
                if part not in parts:
                    raise AdapterError(f"module '{module}' has no {suffix}")
        if not halves:
            raise AdapterError("no LoRA factors among the tensors; expected names like '<module>.lora_A.weight'")
        for module in (magnitudes.keys() | cores.keys()) - halves.keys():
            raise AdapterError(f"module '{module}' has a magnitude vector or a core, but no factors")
        special = {module: kind for module, kind in kinds.items() if kind != "linear"}
        return cls({m: (parts["B"], parts["A"]) for m, parts in halves.items()}, head, magnitudes, special, cores)


def check_shapes(
    mine: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], who: str, lower_rank: bool = False
) -> None:
    """Refuse names and shapes of an adapter's tensors that are not the expected ones.

    Args:
        mine: what there is.
        theirs: what is expected.
        who: whose adapter it is, for the message.
        lower_rank: also accept modules of a lower rank, from 1; one with a core between its factors has no other rank.

    Raises:
        AdapterError: naming `who` and the tensor.
    """
    for name in sorted(theirs.keys() ^ mine.keys()):
        raise AdapterError(f"{who}: tensor '{name}' is {'missing' if name in theirs else 'not expected'}")
    expected = {**theirs, **(_at_rank_of(mine, theirs) if lower_rank else {})}
    for name, shape in mine.items():
        if shape != expected[name]:
            raise AdapterError(f"{who}: tensor '{name}' has shape {shape}, expected {expected[name]}")


def _at_rank_of(
    mine: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the factors of `theirs` at the lower ranks of `mine`."""
    layout, expected = Layout.of(theirs), {}
    for module, (b, a) in layout.factors.items():
        rank = (mine[a] or (0,))[0]
        if module not in layout.cores and 1 <= rank < theirs[a][0]:
            expected[a], expected[b] = (rank, *theirs[a][1:]), (theirs[b][0], rank)
    return expected


def wire_size(adapter: Adapter, parts: frozenset[Part]) -> tuple[int, int]:
    """Bytes of an adapter's factors (and magnitudes) and of its head as sent (serialised; 0 for what is not sent)."""
    sent = (adapter._named(parts - {"head"}), adapter._named(parts & {"head"}))
    factors, head = (_length(tuple((n, t.shape, t.dtype) for n, t in named.items())) for named in sent)
    return factors, head


@lru_cache(64)
def _length(layout: tuple[tuple[str, torch.Size, torch.dtype], ...]) -> int:
    """Bytes of tensors as serialised, whatever their values; the same for the many clients that send alike ones."""
    return len(serialise({name: torch.empty(shape, dtype=dtype) for name, shape, dtype in layout})) if layout else 0
