"""Names of strategies and where they live; third parties add theirs through the entry-point group `fedlora.strategies`.

Looking up names imports nothing heavy: a strategy's module is loaded when it is first used.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fedlora.errors import ConfigError, StrategyRefusal, did_you_mean

if TYPE_CHECKING:
    from fedlora.strategies.base import Refusal, Strategy

GROUP = "fedlora.strategies"

_BUILTIN = {
    "fedit": "fedlora.strategies.fedit:FedIT",
    "ffa-lora": "fedlora.strategies.ffa_lora:FFALoRA",
    "fedsa-lora": "fedlora.strategies.fedsa_lora:FedSALoRA",
    "rolora": "fedlora.strategies.rolora:RoLoRA",
    "flora": "fedlora.strategies.flora:FLoRA",
    "fedex-lora": "fedlora.strategies.fedex_lora:FedExLoRA",
    "flexlora": "fedlora.strategies.flexlora:FlexLoRA",
    "svd": "fedlora.strategies.svd:SVD",
    "flora-na": "fedlora.strategies.flora_na:FLoRANA",
    "lora-fair": "fedlora.strategies.lora_fair:LoRAFAIR",
    "zero-padding": "fedlora.strategies.zero_padding:ZeroPadding",
    "hetlora": "fedlora.strategies.hetlora:HetLoRA",
    "replication": "fedlora.strategies.replication:Replication",
    "fedsvd": "fedlora.strategies.fedsvd:FedSVD",
    "raflora": "fedlora.strategies.raflora:RAFLoRA",
    "fedrot-lora": "fedlora.strategies.fedrot_lora:FedRotLoRA",
    "fedmomentum": "fedlora.strategies.fedmomentum:FedMomentum",
    "florist": "fedlora.strategies.florist:FLoRIST",
    "fed-sb": "fedlora.strategies.fed_sb:FedSB",
    "ravan": "fedlora.strategies.ravan:RAVAN",
    "oracle": "fedlora.strategies.oracle:Oracle",
    "local": "fedlora.strategies.local:Local",
    "centralised": "fedlora.strategies.centralised:Centralised",
}


@cache
def _locations() -> dict[str, str]:
    plugins = {point.name: point.value for point in entry_points(group=GROUP)}
    return plugins | _BUILTIN


def names() -> list[str]:
    """All strategy names, our own first."""
    return list(_BUILTIN) + sorted(set(_locations()) - set(_BUILTIN))


def find(name: str) -> type[Strategy]:
    """The class of a strategy.

    Raises:
        ConfigError: no such strategy, or a plug-in that cannot be imported.
    """
    if name not in _locations():
        raise ConfigError(f"unknown strategy '{name}'.{did_you_mean(name, names())} Known: {', '.join(names())}.")
    module, _, attribute = _locations()[name].partition(":")
    try:
        found: type[Strategy] = getattr(import_module(module), attribute)
    except Exception as error:
        raise ConfigError(f"strategy '{name}' comes from a plug-in that cannot be loaded: {error}") from error
    if name not in _BUILTIN:
        _check_plugin(name, found)
    return found


def _check_plugin(name: str, found: Any) -> None:
    """Refuse what is no strategy, or does not say of itself what lists and tables show."""
    from fedlora.strategies.base import Strategy

    where = f"strategy '{name}' comes from a plug-in"
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise ConfigError(f"{where} whose entry point is {found!r}; expected a subclass of fedlora's Strategy")
    for attribute in ("name", "family", "exact", "summary", "source"):
        if not hasattr(found, attribute):
            raise ConfigError(f"{where} whose class {found.__name__} has no '{attribute}'")
    if found.name != name:
        raise ConfigError(f"{where} whose class calls itself '{found.name}'; entry point and class need one name")


def shadowed() -> list[str]:
    """Names of ours that a plug-in claims too: ours are used."""
    return sorted({point.name for point in entry_points(group=GROUP)} & set(_BUILTIN))


def make(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """A strategy with its options checked.

    Raises:
        ConfigError: unknown strategy or option, or a value that the option does not allow.
    """
    strategy = find(name)
    try:
        return strategy(strategy.Options.model_validate(dict(options or {})))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        known = sorted(strategy.Options.model_fields)
        unknown = first["type"] == "extra_forbidden"
        reason, hint = ("no such option", did_you_mean(key, known)) if unknown else (first["msg"], "")
        raise ConfigError(
            f"strategy_options.{key}={first['input']!r} of strategy '{name}': {reason}.{hint} "
            f"Options: {', '.join(known) or 'none'}."
        ) from None


def check_combination(name: str, variant: str, mixed_ranks: bool, svd_order: bool) -> None:
    """Raise a StrategyRefusal when a strategy cannot be exact, or not be carried out, with these settings."""
    if refused := refusal(find(name), variant, mixed_ranks, svd_order):
        about = f"lora.{refused.setting}" if refused.setting else "these settings of lora"
        raise StrategyRefusal(f"strategy={name} does not go with {about}: {refused.reason}")


def refusal(strategy: Strategy | type[Strategy], variant: str, mixed_ranks: bool, svd_order: bool) -> Refusal | None:
    """What a strategy says of some settings; a plug-in may still give its reason alone, without the setting."""
    from fedlora.strategies.base import Refusal

    found: Any = strategy.refusal(variant, mixed_ranks, svd_order)
    return Refusal("", found) if isinstance(found, str) else found


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise what `make` would; free of heavy imports for a strategy of ours that is given no options."""
    if options or name not in _BUILTIN:
        try:
            make(name, options)
        except ConfigError as error:
            raise ValueError(str(error)) from None
