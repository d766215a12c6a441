"""The work of a run as fedlora would do it, from a folder: the model, every batch in its order, plain training.

Nothing of fedlora is imported here: PyTorch, PEFT and Transformers alone, as anybody would write it, so that it runs in
an environment that has a peer instead. What cannot be told from settings is in the folder (`exported` writes it): rows
of tokens, the rows of each batch of each client in each round, the seeds of dropout, the adapter at the start.

A round: each client begins with the global adapter and a fresh optimiser, trains its batches and scores its own model
on its own test rows; the mean of A, of B and of the head, by examples (FedIT), scores all test rows. Before the first
round the adapter scores all test rows and each client's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Rows = np.ndarray
"""Indices into a split."""
Batch = dict[str, Tensor]


class Score(NamedTuple):
    """Sums over test rows: they add up."""

    loss: float
    hits: int
    examples: int

    @classmethod
    def total(cls, some: Iterable[Score]) -> Score:
        loss, hits, examples = map(sum, zip(*some, strict=True))
        return cls(loss, hits, examples)


class Classifier(nn.Module):
    """The mean of an encoder's output over a text's tokens, and a linear layer."""

    def __init__(self, encoder: Any, labels: int) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(encoder.config.hidden_size, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (batch × labels)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        logits: Tensor = self.classifier((hidden * mask).sum(1) / mask.sum(1).clamp_min(1))
        return logits


class Work:
    """Data, batches and the model with its adapter, in this process, on one thread."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.settings: dict[str, Any] = json.loads((folder / "work.json").read_text())
        self.clients: int = self.settings["clients"]
        self.examples: list[int] = self.settings["examples"]
        """Of each client: its weight in the mean."""
        with np.load(folder / "work.npz") as kept:
            arrays = dict(kept)
        self._tokens = {split: ragged(arrays, f"{split}-tokens") for split in ("train", "test")}
        self._labels = {split: arrays[f"{split}-labels"] for split in ("train", "test")}
        self._batches, self._seeds = ragged(arrays, "batches"), arrays["seeds"]
        scored, counts = ragged(arrays, "scored"), arrays["scored-counts"]
        self._scored = [scored[end - count : end] for count, end in zip(counts, counts.cumsum(), strict=True)]
        self.start = load_file(folder / "start.safetensors")
        self.model = _built(folder, self.settings)
        self.handles = {saved_name(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        assert self.handles.keys() == self.start.keys(), "the adapter is not the one of the model"

    def load(self, adapter: Mapping[str, Tensor]) -> None:
        """Overwrite the attached adapter and head."""
        with torch.no_grad():
            for name, handle in self.handles.items():
                handle.copy_(adapter[name])

    def read(self) -> dict[str, Tensor]:
        """A copy of the attached adapter and head."""
        return {name: handle.detach().clone() for name, handle in self.handles.items()}

    def batches(self, number: int, client: int) -> list[Rows]:
        """The rows of each step of a client in a round (from 1)."""
        steps = self.settings["steps"]
        first = ((number - 1) * self.clients + client) * steps
        return self._batches[first : first + steps]

    def seed_dropout(self, number: int, client: int) -> None:
        torch.default_generator.manual_seed(int(self._seeds[number - 1, client]))

    def optimiser(self, parameters: Sequence[nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
        """A fresh optimiser, and the schedule that warms it up."""
        settings, warm = self.settings, max(self.settings["warmup_steps"], 1)
        optimiser = torch.optim.AdamW(parameters, settings["learning_rate"], weight_decay=settings["weight_decay"])
        return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / warm))

    def train(self, number: int, client: int) -> None:
        """Train the attached adapter as this client does in this round."""
        parameters = list(self.handles.values())
        optimiser, schedule = self.optimiser(parameters)
        self.seed_dropout(number, client)
        self.model.train()
        for rows in self.batches(number, client):
            batch = self.batch("train", rows)
            optimiser.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(self.logits(batch), batch["labels"]).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, self.settings["max_grad_norm"])
            optimiser.step()
            schedule.step()

    def logits(self, batch: Batch) -> Tensor:
        found: Tensor = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return found

    def batch(self, split: str, rows: Rows) -> Batch:
        """Rows padded on the right to the longest of them."""
        texts = [self._tokens[split][row] for row in rows]
        lengths = np.array([len(text) for text in texts])
        filled = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(filled.shape, self.settings["padding"], np.int64)
        ids[filled] = np.concatenate(texts)
        labels = torch.from_numpy(self._labels[split][rows])
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(filled.astype(np.int64)),
            "labels": labels,
        }

    def global_batches(self, part: int = 0, of: int = 1) -> list[Rows]:
        """All test rows, or what one of several processes takes of them, in batches."""
        return self._scored[0][part::of]

    def own_batches(self, client: int) -> list[Rows]:
        """A client's test rows, in batches."""
        return self._scored[1 + client]

    def score(self, batches: Iterable[Rows]) -> Score:
        """Of the attached adapter on batches of test rows."""
        self.model.eval()
        with torch.inference_mode():
            return Score.total([Score(0.0, 0, 0), *(self.score_batch(self.batch("test", rows)) for rows in batches)])

    def score_batch(self, batch: Batch) -> Score:
        logits, labels = self.logits(batch), batch["labels"]
        loss = float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        return Score(loss, int((logits.argmax(-1) == labels).sum()), len(labels))


@lru_cache(maxsize=1)
def opened(folder: Path) -> Work:
    """The work of a folder, opened once in a process."""
    return Work(folder)


def _built(folder: Path, settings: Mapping[str, Any]) -> Any:
    import peft
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    encoder = AutoModel.from_pretrained(settings["base"], dtype=torch.float32, use_safetensors=True)
    lora = peft.LoraConfig.from_pretrained(str(folder))
    return peft.get_peft_model(Classifier(encoder, settings["labels"]), lora)  # type: ignore[arg-type]


def saved_name(name: str) -> str:
    """A parameter's name as PEFT saves it."""
    return name.replace(".modules_to_save.default", "").replace(".default.weight", ".weight")


# -- ragged lists as two arrays each


def ragged(arrays: Mapping[str, np.ndarray], name: str) -> list[np.ndarray]:
    return np.split(arrays[name], arrays[f"{name}-ends"][:-1])


def as_arrays(name: str, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `ragged`."""
    return {name: np.concatenate(rows), f"{name}-ends": np.cumsum([len(row) for row in rows])}
