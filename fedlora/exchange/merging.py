"""Adapters and base updates as plain models: added in place, or merged into a folder that needs neither.

fedlora.merge("run/adapter", "merged/")          a plain model folder
fedlora.apply_base_update(model, "run/adapter")  before PeftModel.from_pretrained(model, "run/adapter")
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from fedlora.adapter.base_update import FILE, BaseUpdate
from fedlora.adapter.weights import PEFT_PREFIX, check_shapes
from fedlora.config import ModelConfig
from fedlora.errors import AdapterError
from fedlora.exchange.description import Description, description, from_pretrained, tokenizer_if_any
from fedlora.exchange.peftconfig import read_configuration
from fedlora.exchange.peftfolder import DESCRIPTION, PeftFolder, open_peft_folder
from fedlora.files.atomic import new_folder, write_atomic, write_json
from fedlora.files.folders import check_free
from fedlora.files.limits import UPLOAD, clean
from fedlora.files.tensorfile import read_tensors, serialise
from fedlora.files.tensorheader import read_header
from fedlora.model import base as models
from fedlora.model import peftlibrary
from fedlora.model.arithmetic import is_packed
from fedlora.model.heads import PooledClassifier
from fedlora.model.resident import add_to_weight, apply_beside
from fedlora.model.targets import stores_transposed, tied_to

_CLASSIFIER = "classifier.safetensors"
_APPLIED = "_fedlora_base_updates"


def apply_base_update(model: Any, folder: str | Path) -> Any:
    """Add the base update in `folder` (`base_delta.safetensors`; none changes nothing) to a model's weights, in place,
    once: a second time is refused. Beside layers that are quantised, whose weights stay as they are.

    Args:
        model: the base model, plain or with PEFT adapters on it.
        folder: of an adapter.

    Raises:
        AdapterError: there is no such folder, the file is damaged or has values that are not finite, or names a module
            that the model does not have, that has another shape, or whose weight another module shares; or the model
            has this update already.
    """
    path = Path(folder)
    if not path.is_dir():
        raise AdapterError(f"{path} is no folder; expected that of an adapter")
    update = BaseUpdate.read(path)
    if update:
        plain, digest = _plain(model), hashlib.sha256((path / FILE).read_bytes()).hexdigest()
        if digest in getattr(plain, _APPLIED, ()):
            raise AdapterError(f"the model has the base update of {path} already; load the base anew to start over")
        add_base_update(model, update)
        setattr(plain, _APPLIED, (*getattr(plain, _APPLIED, ()), digest))
    return model


def _plain(model: Any) -> nn.Module:
    """The model without PEFT around it."""
    found: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return found


def add_base_update(model: Any, update: BaseUpdate) -> None:
    """As `apply_base_update`, for an update in memory."""
    layers = dict(_plain(model).named_modules())
    found = {}
    for module, pair in update.modules.items():
        layer: Any = layers.get(module)
        layer = layer.get_base_layer() if layer is not None and hasattr(layer, "get_base_layer") else layer
        if layer is None or not hasattr(layer, "weight"):
            raise AdapterError(f"base update: the model has no module '{module}' with a weight")
        shape = (layer.out_features, layer.in_features) if is_packed(layer) else tuple(layer.weight.shape)
        expected = pair.shape[::-1] if stores_transposed(layer) else pair.shape
        if shape != expected:
            raise AdapterError(f"base update: module '{module}' is {pair.shape}, but the model's weight is {shape}")
        if not (torch.isfinite(pair.A).all() and torch.isfinite(pair.B).all()):
            raise AdapterError(f"base update: module '{module}' has values that are not finite")
        _refuse_tied(layers, module, layer)
        found[module] = layer
    with torch.no_grad():
        for module, layer in found.items():
            (apply_beside if is_packed(layer) else add_to_weight)(layer, update.modules[module])


def _refuse_tied(layers: Mapping[str, nn.Module], module: str, layer: Any, apart: Collection[int] = ()) -> None:
    """Refuse to change a weight that another module uses too, except those in `apart` (by `id`)."""
    if (tied := tied_to(layers, layer, apart)) is not None:
        raise AdapterError(
            f"module '{module}' shares its weight with '{tied}', which would change too; untie them in the base model"
        )


def _check_merge(layers: Mapping[str, Any]) -> None:
    """Refuse what PEFT would merge wrongly: weights that others share, and attention whose output it adds twice.

    Rows of single tokens may be shared: PEFT has them changed together in both modules, on purpose.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    adapted = {name: layer for name, layer in layers.items() if hasattr(layer, "merge") and hasattr(layer, "lora_A")}
    rows = {name: layer for name, layer in layers.items() if isinstance(layer, TrainableTokensLayer)}
    together = {id(layer.get_base_layer()) for layer in rows.values()}
    for name, layer in (adapted | rows).items():
        base = layer.get_base_layer()
        if isinstance(base, nn.MultiheadAttention):
            raise AdapterError(
                f"module '{name}' is an nn.MultiheadAttention, whose output projection PEFT merges twice; keep the "
                "adapter beside the base (PeftModel.from_pretrained)"
            )
        _refuse_tied(layers, name, base, together if name in rows else ())


def merge(folder: str | Path, out: str | Path, base: Any = None) -> None:
    """Merge an adapter and its base update into a plain model folder.

    Adapters of a fedlora run know their base; for others it is `base`, or what their configuration names. A model with
    its architecture's own head becomes a Transformers folder, which Transformers alone loads, head and label names
    included. A pooled sentence encoder becomes its encoder's folder with the classifier beside it, for which
    Transformers has no class: README.md in the folder has the lines that load it with Transformers, torch and
    safetensors alone. `fedlora.load_merged` reads either. An adapter of a quantised base is merged into the base as it
    was before.

    Args:
        folder: the adapter.
        out: a folder that is not there yet.
        base: a model in memory (which is changed), a model folder or a hub id.

    Raises:
        AdapterError: `out` is there already, or the adapter does not fit the base.
        ModelError: the base cannot be loaded.
    """
    source, target = Path(folder), Path(out)
    check_free(target)
    transformers_logging.disable_progress_bar()
    model, tokenizer, described = _base_of(source, base)
    attached = attach(model, source)
    apply_base_update(attached, source)  # after the embeddings that the adapter may hold, which replace the base's
    _check_merge(dict(_plain(attached).named_modules()))
    merged: Any = attached.merge_and_unload()
    pooled = isinstance(merged, PooledClassifier)
    if pooled and described:  # in the encoder's configuration too, which is all that others read
        merged.encoder.config.id2label = dict(enumerate(described.labels))
        merged.encoder.config.label2id = {label: index for index, label in enumerate(described.labels)}
    with new_folder(target) as draft:
        (merged.encoder if pooled else merged).save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        if pooled:
            _write_classifier(merged, draft)
        write_atomic(draft / "README.md", _card(merged, tokenizer is not None, described).encode())
        if described:
            write_json(draft / DESCRIPTION, described.content)


def attach(model: Any, folder: Path) -> Any:
    """The model with an adapter from anyone on it: PEFT sees a configuration of checked values in which every module is
    named, and no tensor of the adapter is passed over.

    Raises:
        AdapterError: the folder is not that of a LoRA or HiRA adapter, or does not fit the model.
    """
    peft = peftlibrary.load()
    saved_by = peft.get_peft_model_state_dict
    opened = open_peft_folder(folder)
    _grow(model, opened)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attached = peft.PeftModel.from_pretrained(model, str(folder), config=_peft_config(opened))
    except Exception as error:
        raise AdapterError(f"{folder} does not fit the base model: {clean(_words(error))}") from error
    wanted = {name.removesuffix(".weight") for name in saved_by(attached, save_embedding_layers=False)}
    given = {name.removesuffix(".weight") for name in opened.stored if not name.endswith(".base_layer.weight")}
    saved = {name.removesuffix(".weight") for name in saved_by(attached, save_embedding_layers=True)}
    for name in sorted((given ^ wanted) - (given & saved)):
        state = "is not in the base model" if name in given else "is missing"
        raise AdapterError(f"{folder} does not fit the base model: tensor '{name}' {state}")
    return attached


def _grow(model: Any, folder: PeftFolder) -> None:
    """Give the model as many tokens as the embedding that PEFT saved beside the factors has rows: the vocabulary was
    changed before training, and both embeddings come with the adapter."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is None or not hasattr(model, "resize_token_embeddings"):
        return
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    stored = folder.stored.shapes.get(f"{PEFT_PREFIX}{name}.weight")
    if stored and stored[0] != embedding.weight.shape[0]:
        model.resize_token_embeddings(stored[0], mean_resizing=False)


def _words(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())


def _peft_config(folder: PeftFolder) -> Any:
    """PEFT's own object; never made from the file, whose other keys PEFT would act upon."""
    peft = peftlibrary.load()
    content = {key: value for key, value in folder.peft_content().items() if key != "peft_type"}
    return (peft.HiraConfig if folder.variant == "hira" else peft.LoraConfig)(**content)


def _write_classifier(model: PooledClassifier, folder: Path) -> None:
    """What a Transformers folder of the encoder does not hold: the classifier, and how tokens are pooled."""
    write_atomic(folder / _CLASSIFIER, serialise(model.classifier.state_dict()))
    pooling = {"pooling_mode_mean_tokens": model.pooling == "mean", "pooling_mode_cls_token": model.pooling == "cls"}
    write_atomic(folder / "1_Pooling" / "config.json", json.dumps(pooling).encode())


def _card(model: Any, tokenizer: bool, described: Description | None) -> str:
    """README.md of a merged model: how it is loaded without PEFT and fedlora, as code that runs from anywhere."""
    pooled = isinstance(model, PooledClassifier)
    kind = type(model).__name__
    most = described.content.get("max_length", 128) if described else 128
    if pooled:
        code = _POOLED.format(most=most, pool=_POOLS[model.pooling])
    elif kind.endswith("ForSequenceClassification") and tokenizer:
        code = _OWN_HEAD.format(most=most)
    else:
        code = f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained("this folder").eval()\n'
    head = "# A merged model\n\nAn adapter in the weights of its base. It needs neither PEFT nor fedlora:\n\n"
    return f"{head}```python\n{code}```\n{_NO_CLASS if pooled else ''}"


_NO_CLASS = """
Do not load it as `AutoModelForSequenceClassification`: no class of Transformers pools this encoder's tokens as it was
trained (`1_Pooling/config.json`), and a random head would take the place of `classifier.safetensors`.
"""


_OWN_HEAD = """\
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "this folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
texts = ["one text", "another text"]
inputs = tokenizer(texts, padding=True, truncation=True, max_length={most}, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print([model.config.id2label[index] for index in logits.argmax(1).tolist()])
"""
_POOLED = """\
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

folder = "this folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
encoder = AutoModel.from_pretrained(folder).eval()
head = load_file(f"{{folder}}/classifier.safetensors")
texts = ["one text", "another text"]
inputs = tokenizer(texts, padding=True, truncation=True, max_length={most}, return_tensors="pt")
with torch.no_grad():
    hidden = encoder(**inputs).last_hidden_state.float()
{pool}
    logits = pooled @ head["weight"].T + head["bias"]
print([encoder.config.id2label[index] for index in logits.argmax(1).tolist()])
"""
_POOLS = {
    "mean": '    mask = inputs["attention_mask"][..., None].float()\n    pooled = (hidden * mask).sum(1) / mask.sum(1)',
    "cls": "    pooled = hidden[:, 0]",
}


def _read_classifier(classifier: nn.Module, path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in classifier.state_dict().items()}
    check_shapes({name: tensor.shape for name, tensor in read_header(path).items()}, expected, str(path))
    classifier.load_state_dict(read_tensors(path, UPLOAD))


def load_merged(folder: str | Path) -> tuple[Any, Any, list[str]]:
    """The plain model that `merge` wrote of a fedlora adapter, its tokenizer and the names of its labels.

    Raises:
        AdapterError: the folder was not written by `merge`, or its classifier is damaged.
        ModelError: the model cannot be loaded.
    """
    path = Path(folder)
    described = description(path)
    here = ModelConfig(name=str(path.absolute()), pooling=described.model.pooling, dtype=described.model.dtype)
    tokenizer = models.load_tokenizer(here)
    model = described.network(here, tokenizer)
    if isinstance(model, PooledClassifier):
        _read_classifier(model.classifier, path / _CLASSIFIER)
    return model.eval(), tokenizer, described.labels


def _base_of(folder: Path, base: Any) -> tuple[Any, Any, Description | None]:
    """The base model, its tokenizer if there is one, and what fedlora knows of an adapter of its own."""
    if (folder / DESCRIPTION).is_file():
        described = description(folder)
        if base is None or isinstance(base, str | Path):
            named = {} if base is None else {"name": str(base)}
            config = described.model.model_copy(update={**named, "quantization": "none"})
            tokenizer = models.load_tokenizer(config)
            return described.network(config, tokenizer), tokenizer, described
        return base, None, described
    if base is not None and not isinstance(base, str | Path):
        return base, None, None
    return *_from_hub_or_folder(folder, base), None


_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def _from_hub_or_folder(folder: Path, base: str | Path | None) -> tuple[Any, Any]:
    import transformers

    config = read_configuration(folder)
    name, task = base or config.get("base_model_name_or_path"), config.get("task_type")
    if not name or task is None:
        raise AdapterError(
            f"{folder}: its configuration does not say which model it is for (base {name}, task_type {task}); "
            "give the model itself: fedlora.merge(folder, out, base=model)"
        )
    kind = getattr(transformers, _CLASSES[task])
    return from_pretrained(kind, str(name)), tokenizer_if_any(str(name))
