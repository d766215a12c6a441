"""What came of an aggregation, and writing it: a folder that is there whole or not at all.

OUT/  adapter_config.json  adapter_model.safetensors  README.md   the global adapter at the highest rank
      base_delta.safetensors                                      where the strategy changes the base
      client-000/ …                                               with `per_client`: each client's at its own rank
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedlora.adapter import Adapter
from fedlora.adapter.base_update import BaseUpdate
from fedlora.adapter.divergence import Divergence
from fedlora.adapter.updates import Updates
from fedlora.errors import AdapterError, counted
from fedlora.exchange.alignment import Alignment
from fedlora.exchange.peftfolder import (
    DESCRIPTION,
    TOKENS,
    PeftFolder,
    check_written,
    config_at_ranks,
    write_peft_folder,
)
from fedlora.files.atomic import new_folder, write_atomic, write_json
from fedlora.files.folders import check_free, has_room, is_folder
from fedlora.files.limits import file_within, read_json
from fedlora.metrics import Bytes
from fedlora.strategies.base import ServerState, Strategy
from fedlora.strategies.step import measure_round


@dataclass(frozen=True)
class Aggregated:
    """What came of an aggregation; `save` writes it, `report` is its JSON content."""

    strategy: Strategy
    clients: tuple[PeftFolder, ...]
    updates: Updates
    state: ServerState
    divergence: Divergence
    bytes: Bytes
    seconds: float
    alignment: Alignment

    @property
    def weights(self) -> tuple[float, ...]:
        """The clients' weights, normalised."""
        return tuple(self.updates.weights.tolist())

    @property
    def adapter(self) -> Adapter | None:
        """The global adapter at the highest rank; None where clients keep adapters of their own."""
        return None if self.strategy.traits.personal else self.state.adapter

    @property
    def base(self) -> BaseUpdate:
        """What is to be added to the base weights; empty for most strategies."""
        return self.state.base_step

    @cached_property
    def global_rho(self) -> float:
        """ρ of the global adapter: lower than that of what clients receive where some have a lower rank."""
        if all(self.state.rank_of(index) == self.state.adapter.rank for index in range(len(self.clients))):
            return self.divergence.rho
        whole = replace(self.state, ranks={})
        return measure_round(self.strategy, whole, self.updates).rho

    @property
    def notes(self) -> list[str]:
        """What does not stop an aggregation, but should be known."""
        return _notes(self)

    def client(self, index: int) -> Adapter:
        """What the client at a position of the list goes on with, at its own rank and in its own scaling."""
        return self.alignment.own(index, self.strategy.broadcast(self.state, index))

    def report(self) -> dict[str, Any]:
        """`strategy`, `clients`, `rho` (model and by module), `abo`, `bytes` and `seconds`.

        `rho.model` is of what clients receive, each at its own rank; `rho.global` of the global adapter as written.
        A ratio to a mean update of zero is None (null in JSON) where it is not 0/0.
        """
        found = self.divergence
        clients = zip(self.clients, self.weights, strict=True)
        return {
            "strategy": self.strategy.name,
            "clients": [{"path": str(c.path), "rank": c.rank, "weight": weight} for c, weight in clients],
            "rho": {
                "model": _number(found.rho),
                "floor": _number(found.floor),
                "excess": _number(found.excess),
                "global": None if self.adapter is None else _number(self.global_rho),
                "modules": {
                    name: {
                        "rho": _number(m.rho),
                        "floor": _number(m.floor),
                        "effective_clients": m.effective_clients,
                    }
                    for name, m in found.modules.items()
                },
            },
            "abo": {"R": found.R, "P": found.P, "Q": found.Q, "dispersion": found.dispersion},
            "bytes": asdict(self.bytes),
            "seconds": self.seconds,
        }

    def save(self, out: str | Path, per_client: bool = False, report: str | Path | None = None) -> None:
        """Write `out` (and the report) as a whole or not at all; see the head of this module.

        Raises:
            AdapterError: `out` is there already, or there is no global adapter and `per_client` is not set.
            RunFolderError: it cannot be written.
        """
        _write(self, Path(out), per_client, Path(report) if report else None)


def check_target(out: Path, personal: bool, per_client: bool, report: Path | None = None) -> None:
    """Refuse a target that would overwrite something, cannot be written, or that there is nothing to write to.

    Raises:
        AdapterError: says what to do.
    """
    check_free(out)
    if report is not None and (is_folder(report) or report.absolute() == out.absolute() or not has_room(report)):
        raise AdapterError(f"the report cannot be written to {report}; choose a file in a folder that can be written")
    if personal and not per_client:
        raise AdapterError("this strategy keeps one adapter per client and has no global one; add --per-client")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _notes(result: Aggregated) -> list[str]:
    found = []
    for key, what in (("base_model_name_or_path", "base models"), ("revision", "revisions of the base model")):
        named = sorted({str(client.config.get(key)) for client in result.clients})
        if len(named) > 1:
            found.append(f"the adapters name different {what} ({', '.join(named[:3])}); they are taken to be the same")
    for note in dict.fromkeys(note for client in result.clients for note in client.notes):
        first = next(client for client in result.clients if note in client.notes)
        count = sum(note in client.notes for client in result.clients) - 1
        found.append(f"{first.path}{f' and {count} more' if count else ''}: {note}")
    if result.alignment.mixed and not result.strategy.traits.personal:
        found.append(_words_of_scalings(result))
    return found


def _words_of_scalings(result: Aggregated) -> str:
    """How clients of different alpha/r were made comparable."""
    alignment = result.alignment
    module = min(module for ratios in alignment.ratios for module in ratios)
    values = sorted({f"{client.scalings[module]:g}" for client in result.clients}, key=float)
    return (
        f"the adapters have different alpha/r ({', '.join(values)} in '{module}'); {alignment.part} of each was "
        f"multiplied by its alpha/r over {alignment.scalings[module]:g}, that of the result: updates are what they were"
    )


def _write(result: Aggregated, out: Path, per_client: bool, report: Path | None) -> None:
    """Write everything beside `out` first, then the report, then move the folder there (with a report within it).

    Raises:
        AdapterError: `out` is there already, or there is no global adapter and `per_client` is not set.
        RunFolderError: it cannot be written.
    """
    check_target(out, result.strategy.traits.personal, per_client, report)
    with new_folder(out) as draft:
        _fill(result, draft, per_client)
        if report:
            _write_report(result, _within(report, out, draft))


def _within(report: Path, out: Path, draft: Path) -> Path:
    """Where the report goes while what will be `out` is still a draft."""
    here, folder = Path(os.path.abspath(report)), Path(os.path.abspath(out))
    if not here.is_relative_to(folder):
        return report
    place = draft / here.relative_to(folder)
    if place.exists():
        raise AdapterError(f"the report cannot be written to {report}, which is part of the result")
    return place


def _write_report(result: Aggregated, place: Path) -> None:
    write_json(place, result.report(), allow_nan=False)


def _fill(result: Aggregated, folder: Path, per_client: bool) -> None:
    highest = max(result.clients, key=lambda client: client.rank)
    if result.adapter is not None:
        _adapter(result, result.adapter, highest, result.alignment.scalings, folder)
    if result.base:
        result.base.write(folder)
    for index, client in enumerate(result.clients if per_client else ()):
        own = folder / f"client-{index:03d}"
        _adapter(result, result.client(index), client, result.alignment.own_scalings(index), own)
        if result.base:
            result.base.write(own)


def _adapter(
    result: Aggregated, adapter: Adapter, like: PeftFolder, scalings: Mapping[str, float], folder: Path
) -> None:
    ranks = {module: adapter.factors[module].rank for module in adapter.modules}
    tokens = {
        name: result.alignment.tokens.get(name, like.tokens.get(name, ())) for name in adapter.head if TOKENS in name
    }
    write_peft_folder(adapter, folder, config_at_ranks(like.config, ranks, scalings, tokens), _card(result, like))
    check_written(folder, adapter, scalings)
    described = {_described(client) for client in result.clients}
    if len(described) == 1 and (content := described.pop()):
        write_atomic(folder / DESCRIPTION, content.encode())


def _described(client: PeftFolder) -> str:
    """What a run of fedlora wrote beside its adapter, without what is of that run alone; empty for other adapters."""
    try:
        content = read_json(file_within(client.path, DESCRIPTION))
        kept = {key: content[key] for key in ("model", "labels", "max_length")}
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return json.dumps(kept, indent=1) + "\n"


def _card(result: Aggregated, like: PeftFolder) -> str:
    found = result.divergence
    whole = ""
    if result.adapter is not None and result.global_rho != found.rho:
        whole = f" That of the global adapter at the highest rank is {result.global_rho:.4g}."
    base = ""
    if result.base:
        base = (
            "\n`base_delta.safetensors` belongs to it: the base weights get `left @ right` of every module "
            '(`fedlora.apply_base_update(model, "this folder")`, or `fedlora merge`).\n'
        )
    return f"""---
library_name: peft
base_model: {json.dumps(str(like.config.get("base_model_name_or_path") or "unknown"))}
tags: [lora, federated, {result.strategy.name}]
---
# {counted(len(result.clients), "adapter")} combined by `{result.strategy.name}`

Divergence ρ {found.rho:.4g} (floor {found.floor:.4g}): the relative error of what clients receive, each at its own
rank, against the weighted mean of their updates.{whole}
{base}"""
