"""The head of a sequence classifier: pooling and a linear layer, or the architecture's own, fresh or a checkpoint's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedlora import seeds
from fedlora.errors import ModelError

NOTE = "head_note"
"""Attribute of a loaded classifier: what was done about its checkpoint's head, in words; empty where it has none."""


class PooledClassifier(nn.Module):
    """A sentence encoder, the mean or first token of its output, and a linear classifier."""

    def __init__(self, encoder: Any, labels: int, pooling: str) -> None:
        super().__init__()
        config = encoder.config
        self.config = config
        self.encoder = encoder
        self.pooling = pooling
        self.classifier = nn.Linear(config.hidden_size, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Any:
        """Logits (batch × labels) as `.logits`, from token ids and mask (batch × tokens)."""
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = attention_mask[..., None].to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        return SequenceClassifierOutput(logits=self.classifier(pooled.to(self.classifier.weight.dtype)))


def head_modules(model: nn.Module) -> list[str]:
    """Names of the modules that make up the head: all children with parameters outside the pre-trained body; none of a
    network that writes, whose output layer is pre-trained too."""
    if writes(model):
        return []
    body = "encoder" if isinstance(model, PooledClassifier) else getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]


def writes(model: nn.Module) -> bool:
    """Whether a network predicts the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    return type(model).__name__ in CAUSAL.values()


def rows_by_name(declared: Mapping[int, str], labels: Sequence[str]) -> list[int] | None:
    """The checkpoint's row for each of our labels, by its `id2label`; None where a name is missing there.

    Case does not count where it tells no two names apart. `LABEL_0`, … are no names: Transformers makes them up.
    """
    names = [str(declared[index]) for index in sorted(declared)]
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names) and list(labels) != names:
        return None
    for fold in (str, str.casefold):
        known = {fold(name): index for index, name in enumerate(names)}
        ours = [fold(label) for label in labels]
        if len(known) == len(names) and len(set(ours)) == len(ours) and all(name in known for name in ours):
            return [known[name] for name in ours]
    return None


def load_classifier(kind: Any, location: str, declared: Any, labels: Sequence[str], seed: int, **how: Any) -> Any:
    """A classifier of `labels` with its architecture's own head.

    A checkpoint that was fine-tuned to classify has a head. Where its names are ours, its rows are taken, in our order;
    otherwise the head is drawn anew by `seed`, as it is where there is none. `NOTE` says which.

    Args:
        kind: `AutoModelForSequenceClassification`.
        location: folder or hub id.
        declared: the checkpoint's configuration.
        labels: names of the classes.
        seed: of the run.
        how: for `from_pretrained`.

    Raises:
        ModelError: the weights of the body do not fit the configuration.
        Exception: whatever Transformers raises where it cannot load them.
    """
    rows = rows_by_name(declared.id2label or {}, labels)
    if rows is not None:
        model, missing = _load(kind, location, seed, how)
        if not missing & _head_parameters(model):
            _take_rows(model, rows, len(declared.id2label))
            return _named(model, labels, _order_note(rows, labels))
    model, missing = _load(kind, location, seed, {**how, "num_labels": len(labels)})
    stored = _head_parameters(model) - missing
    if stored:
        _draw_anew(model, seed)
    note = f"a fresh head: the checkpoint's is for other classes ({_listed(declared.id2label)})" if stored else ""
    return _named(model, labels, note)


def _load(kind: Any, location: str, seed: int, how: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """The model, and which parameters its checkpoint lacks (drawn by `seed`)."""
    seeds.seed_torch(seed, "head")
    model, found = kind.from_pretrained(location, ignore_mismatched_sizes=True, output_loading_info=True, **how)
    mismatched = {str(entry[0]) for entry in found["mismatched_keys"]}
    outside = sorted(mismatched - _head_parameters(model))
    if outside:
        raise ModelError(
            f"{location}: weight '{outside[0]}' has another shape than config.json says; the folder mixes two models"
        )
    return model, {str(name) for name in found["missing_keys"]}


def _head_parameters(model: nn.Module) -> set[str]:
    heads = tuple(f"{name}." for name in head_modules(model))
    return {name for name, _ in model.named_parameters() if name.startswith(heads)}


def _draw_anew(model: Any, seed: int) -> None:
    """As Transformers draws a head that a checkpoint lacks."""
    seeds.seed_torch(seed, "head")
    with torch.no_grad():
        for name in head_modules(model):
            for module in model.get_submodule(name).modules():
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter._is_hf_initialized = False
                module._is_hf_initialized = False
                model._init_weights(module)


def _take_rows(model: Any, rows: Sequence[int], count: int) -> None:
    """Put the rows of the last linear layer in our order; those of further classes are left out."""
    layers = [layer for name in head_modules(model) for layer in model.get_submodule(name).modules()]
    last = [layer for layer in layers if isinstance(layer, nn.Linear) and layer.out_features == count][-1]
    wanted = torch.tensor(rows, device=last.weight.device)
    with torch.no_grad():
        last.weight = nn.Parameter(last.weight[wanted].clone())
        if last.bias is not None:
            last.bias = nn.Parameter(last.bias[wanted].clone())
    last.out_features = len(rows)


def _named(model: Any, labels: Sequence[str], note: str) -> Any:
    model.num_labels = model.config.num_labels = len(labels)
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    setattr(model, NOTE, note)
    return model


def _order_note(rows: Sequence[int], labels: Sequence[str]) -> str:
    if list(rows) == list(range(len(rows))):
        return "the checkpoint's own head, whose classes are these"
    moved = ", ".join(f"{label} from row {row}" for label, row in list(zip(labels, rows, strict=True))[:3])
    return f"the checkpoint's own head, its rows in the order of the labels ({moved}{', …' if len(rows) > 3 else ''})"


def _listed(declared: Mapping[int, str], most: int = 4) -> str:
    names = [str(name) for name in declared.values()]
    return f"{len(names)}: {', '.join(names[:most])}{', …' if len(names) > most else ''}"
