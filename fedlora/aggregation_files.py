"""Writing what came of an aggregation: a folder that is there whole or not at all.

OUT/  adapter_config.json  adapter_model.safetensors  README.md   the global adapter at the highest rank
      base_delta.safetensors                                      where the strategy changes the base
      client-000/ …                                               with `per_client`: each client's at its own rank
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.adapter import Adapter
from fedlora.atomic import new_folder, write_atomic
from fedlora.errors import AdapterError, counted
from fedlora.limits import clean, file_within, read_json
from fedlora.peftfolder import DESCRIPTION, TOKENS, PeftFolder, check_written, config_at_ranks, write_peft_folder

if TYPE_CHECKING:
    from fedlora.aggregation import Aggregated


def check_target(out: Path, personal: bool, per_client: bool, report: Path | None = None) -> None:
    """Refuse a target that would overwrite something, cannot be written, or that there is nothing to write to.

    Raises:
        AdapterError: says what to do.
    """
    check_free(out)
    if report is not None and (_is_folder(report) or report.absolute() == out.absolute() or not _has_room(report)):
        raise AdapterError(f"the report cannot be written to {report}; choose a file in a folder that can be written")
    if personal and not per_client:
        raise AdapterError("this strategy keeps one adapter per client and has no global one; add --per-client")


def check_free(out: Path) -> None:
    """Refuse an output folder that is there (unless empty), or that cannot be made.

    Raises:
        AdapterError: choose another.
    """
    empty = _is_folder(out) and not out.is_symlink() and not any(out.iterdir())
    if os.path.lexists(out) and not empty:
        raise AdapterError(f"{out} is there already; choose another output folder")
    if not _has_room(out):
        raise AdapterError(f"{out} cannot be made: {_nearest(out)} is no folder that can be written; choose another")


def _is_folder(path: Path) -> bool:
    """Whether it is one; what no file can be called is refused when it is to be made.

    Raises:
        AdapterError: the name is too long.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise AdapterError(f"{clean(str(path))}: {error.strerror}; choose another") from None


def _has_room(path: Path) -> bool:
    """Whether the nearest folder above that is there can be written to."""
    above = _nearest(path)
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def _nearest(path: Path) -> Path:
    return next(above for above in path.absolute().parents if os.path.lexists(above))


def write(result: Aggregated, out: Path, per_client: bool, report: Path | None) -> None:
    """Write everything beside `out` first, then the report, then move the folder there (with a report within it).

    Raises:
        AdapterError: `out` is there already, or there is no global adapter and `per_client` is not set.
        RunFolderError: it cannot be written.
    """
    check_target(out, result.strategy.personal, per_client, report)
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
    write_atomic(place, (json.dumps(result.report(), indent=1, allow_nan=False) + "\n").encode())


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
