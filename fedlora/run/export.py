"""What a finished run leaves for people and other programs: the adapter as a PEFT folder, tables and figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.adapter import Adapter
from fedlora.config import RunConfig
from fedlora.errors import counted, saving
from fedlora.exchange.peftfolder import DESCRIPTION, config_at_ranks, write_peft_folder
from fedlora.files.atomic import write_json
from fedlora.metrics import RoundRecord
from fedlora.report import plots
from fedlora.run import rounds
from fedlora.run.records import Setup
from fedlora.run.runfolder import RunFolder

LONGEST_TABLE = 50_000
"""Rows of `tables/clients.json`, some 20 MB."""


def final(run: RunFolder) -> None:
    """Write `adapter/`, `tables/` and `figures/` of a finished run.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    with saving(run.path):
        adapter(run, run.config.rounds, run.path / "adapter")
        records = {run.config.strategy: _tables(run)}
        answers(run, run.config.rounds)
        plots.rounds_figure(records, run.path / "figures" / "rounds.png", run.score)
        plots.conditions_figure(records, run.path / "figures" / "conditions.png")


def _tables(run: RunFolder) -> list[RoundRecord]:
    """Write rows of `fedlora.run.rows`, of the rounds after training began; of clients those of as many rounds as stay
    below `LONGEST_TABLE` rows, evenly from the first to the last. Returns the records of all rounds."""
    kept = _some(run.config.rounds, max(2, LONGEST_TABLE // run.config.clients_asked))
    found: dict[str, list[Any]] = {"divergence": [], "clients": []}
    records = []
    for record in run.closed():
        records.append(RoundRecord.from_json(record))
        if record["round"]:
            found["divergence"] += record["rows"]["divergence"]
            found["clients"] += record["rows"]["clients"] if record["round"] in kept else ()
    for name, rows in found.items():
        run.write_json(f"tables/{name}.json", rows)
    return records


def _some(rounds: int, most: int) -> set[int]:
    """At most so many rounds, the first and the last among them."""
    return set(range(1, rounds + 1)) if rounds <= most else {round(n) for n in np.linspace(1, rounds, most)}


def answers(run: RunFolder, number: int) -> Path | None:
    """Write what was answered in writing up to a round (`tables/answers.json`, columns and rows as MLflow shows a
    table); the file, or None where nothing was answered after that round."""
    written = [record["rows"].get("answers", []) for record in itertools.islice(run.closed(), number + 1)]
    if not written[-1]:
        return None
    rows = list(itertools.chain.from_iterable(written))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = run.path / "tables" / "answers.json"
    write_json(file, {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]})
    return file


def adapter(run: RunFolder, number: int, folder: Path) -> None:
    """The adapter after a round as a PEFT folder, with `base_delta.safetensors` where the strategy changed the base.

    Where clients keep adapters of their own, each has a folder `client-NNN/` instead.
    """
    state, strategy = run.read_state(number), run.strategy
    if not strategy.traits.personal:
        _adapter_folder(run, number, state.adapter, folder, state.scaling)
    if state.base:
        state.base.write(folder)
    for client in sorted(state.personal):
        own = strategy.broadcast(state, client)
        _adapter_folder(run, number, own, folder / f"client-{client:03d}", state.scaling)


def _adapter_folder(run: RunFolder, number: int, weights: Adapter, folder: Path, scaling: float) -> None:
    setup = Setup.read(run)
    weights = weights.folded()
    ranks = {module: weights.factors[module].rank for module in weights.modules}
    peft_config = config_at_ranks(run.need_json("adapter_config.json"), ranks, scaling)
    write_peft_folder(weights, folder, peft_config, _card(run, number, peft_config))
    labels = list(setup.labels) if run.objective.labelled else []
    content = {"model": run.config.model.model_dump(mode="json"), "labels": labels, "round": number}
    content |= {} if run.config.task == "classification" else {"task": run.config.task}
    if run.config.data.chat_template != "auto":
        content["chat_template"] = run.config.data.chat_template
    content |= {"max_length": run.config.data.max_length, "strategy": run.config.strategy}
    content["provenance"] = {"model": setup.model, "data": asdict(setup.data)}
    write_json(folder / DESCRIPTION, content)


def _card(run: RunFolder, number: int, peft_config: Mapping[str, Any]) -> str:
    config = run.config
    record = rounds.read_record(run, number)
    scores = "\n".join(
        f"| {name} | {value:.4f} |"
        for name, value in (record.metrics if record else {}).items()
        if "/" in name and name.split("/")[0] in ("global", "local", "gap", "rho")
    )
    base = ""
    if run.strategy.traits.changes_base:
        base = (
            "\n\n**The strategy also changed the base.** `base_delta.safetensors` holds what is added to its weights:"
            '\ncall `fedlora.apply_base_update(base, "this folder")` before `PeftModel.from_pretrained`, or make a'
            "\nplain model with `fedlora merge`. `fedlora.load_adapter` does it for you."
        )
    labels = len(Setup.read(run).labels)
    made, otherwise = run.objective.with_peft_alone(config.model, labels, bool(base))
    return f"""---
library_name: peft
base_model: {config.model.name}
tags: [lora, federated, {config.strategy}]
---
# {config.strategy} on {config.data.name}, round {number} of {config.rounds}

An adapter ({_kind(config, peft_config)}) trained by {counted(config.clients, "client")} (`{config.partition.name}`
partition, seed {config.seed}) and combined by `{config.strategy}`.

```python
import fedlora
model, tokenizer, labels = fedlora.load_adapter("this folder")
```

With PEFT alone: `PeftModel.from_pretrained(base, "this folder")`, where `base` is
{made}{base}{otherwise}

| metric | value |
|---|---|
{scores}
"""


def _kind(config: RunConfig, peft_config: Mapping[str, Any]) -> str:
    """Variant, rank and alpha as they are in the file, and the clients' ranks where they differ."""
    alpha = f", alpha {peft_config['lora_alpha']:g}" if "lora_alpha" in peft_config else ""
    ranks = ", clients of several ranks" if config.lora.mixed_ranks else ""
    return f"{config.lora.variant}, rank {peft_config['r']}{alpha}{ranks}"
