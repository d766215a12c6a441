"""The work of a run of fedlora's, in a folder that `work.Work` reads without fedlora."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from fedlora import seeds
from fedlora.config import RunConfig
from fedlora.data import tokens
from fedlora.data.batches import training_rows
from fedlora.data.partition import Partition
from fedlora.model.base import pooling_of
from fedlora.model.known import resolve
from fedlora.run import jobs, rounds
from fedlora.run.records import Setup
from fedlora.run.runfolder import RunFolder
from fedlora.training.workers import Workbench

from .work import as_arrays


def write(config: RunConfig, folder: Path) -> None:
    """Export the work of a configuration; `work` knows the demo's kind alone, and anything else is refused."""
    _check(config)
    run, bench = RunFolder.create(folder / "run", config), Workbench("cpu")
    jobs.prepare_data(bench, run.path)
    jobs.initialise(bench, run.path)
    setup, parts = Setup.read(run), Partition.load(run.path / "partition.npz")
    data = tokens.open_tokens(setup.tokens)
    assert data.padding_side == "right"
    splits = {name: tokens.examples(split, np.arange(len(split))) for name, split in _splits(data)}
    arrays: dict[str, np.ndarray] = {}
    for name, examples in splits.items():
        assert examples.token_type_ids is None
        arrays |= as_arrays(f"{name}-tokens", examples.input_ids) | {f"{name}-labels": examples.labels}
    arrays |= as_arrays("batches", list(_batches(config, data, parts)))
    numbers, clients = range(1, config.rounds + 1), range(config.clients)
    keys = [[seeds.key(config.seed, "dropout", number, client) for client in clients] for number in numbers]
    arrays["seeds"] = np.array(keys, np.int64)
    scored = _scored(run, splits["test"].lengths, parts)
    arrays |= as_arrays("scored", [batch for part in scored for batch in part])
    arrays["scored-counts"] = np.array([len(part) for part in scored])
    np.savez(folder / "work.npz", **arrays)  # type: ignore[arg-type]
    save_file(run.read_state(0).adapter.tensors(), folder / "start.safetensors")
    lora = run.need_json("adapter_config.json") | {"inference_mode": False, "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    (folder / "work.json").write_text(json.dumps(_settings(config, setup, parts)))


def _check(config: RunConfig) -> None:
    training = config.training
    assert config.strategy == "fedit", config.strategy
    assert config.fraction == 1, config.fraction
    assert config.weighting == "examples", config.weighting
    assert config.evaluation.every == 1, config.evaluation
    assert config.evaluation.local, config.evaluation
    assert pooling_of(config.model) == "mean", config.model
    assert training.optimizer == "adamw", training
    assert training.gradient_accumulation == 1, training
    assert training.local_steps, training
    assert training.max_grad_norm, training
    assert training.final_learning_rate is None, training


def _splits(data: tokens.TokenisedData) -> list[tuple[str, Any]]:
    return [("train", data.train), ("test", data.test)]


def _batches(config: RunConfig, data: tokens.TokenisedData, parts: Partition) -> Iterator[np.ndarray]:
    """The rows of each step, by round, client and step."""
    own = [tokens.examples(data.train, rows) for rows in parts.train]
    training = config.training
    assert training.local_steps
    for number in range(1, config.rounds + 1):
        for client, examples in enumerate(own):
            order = seeds.torch_generator(config.seed, "batches", number, client)
            for rows in training_rows(examples, training.step_size, training.local_steps, order):
                yield parts.train[client][rows]


def _scored(run: RunFolder, lengths: np.ndarray, parts: Partition) -> list[list[np.ndarray]]:
    """Batches of test rows, in the order of length as fedlora scores them: all rows, then those of each client."""
    size, every = run.config.evaluation.batch_size, np.arange(len(lengths))
    dealt = [part for part in rounds.evaluation_parts(run, 0) if part.split == "global"]
    whole = [batch for part in dealt for batch in _batched(every[part.start :: part.step], lengths, size)]
    return [whole, *(_batched(rows, lengths, size) for rows in parts.test)]


def _batched(rows: np.ndarray, lengths: np.ndarray, size: int) -> list[np.ndarray]:
    ordered = rows[np.argsort(lengths[rows], kind="stable")]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def _settings(config: RunConfig, setup: Setup, parts: Partition) -> dict[str, Any]:
    training = config.training.model_dump(include={"learning_rate", "warmup_steps", "weight_decay", "max_grad_norm"})
    return training | {
        "clients": config.clients,
        "steps": config.training.local_steps,
        "examples": [len(rows) for rows in parts.train],
        "base": str(resolve(config.model.name)),
        "labels": len(setup.labels),
        "padding": setup.pad_token_id,
    }
