"""A client's upload: the header first, then the tensors, then their values."""

from dataclasses import replace

import pytest
import torch

from fedlora.adapter import Adapter
from fedlora.channel import uploads
from fedlora.errors import AdapterError
from fedlora.files import tensorfile
from fedlora.files.limits import Limits
from fedlora.files.tensorfile import serialise

WHO = "client 3, round 2"
A = "base_model.model.narrow.lora_A.weight"
B = "base_model.model.narrow.lora_B.weight"


@pytest.fixture
def like(uploads):
    """With everything that an adapter can hold, a core in one module."""
    adapter = uploads.adapter(0)
    magnitudes = {module: torch.ones(pair.shape[0]) for module, pair in adapter.factors.items()}
    return replace(adapter, magnitudes=magnitudes, cores={"encoder.layer.1.mlp": torch.ones(3, 3)})


@pytest.fixture
def sent(like, tmp_path):
    """`sent(change)`: the file of an upload, its tensors changed by a function."""

    def file(change=lambda tensors: None):
        tensors = like.tensors()
        change(tensors)
        (tmp_path / "client-003.safetensors").write_bytes(serialise(tensors))
        return tmp_path / "client-003.safetensors"

    return file


def test_what_is_expected_is_read(sent, like):
    found = uploads.inspect(sent(), like, WHO)
    assert all(torch.equal(tensor, like.tensors()[name]) for name, tensor in found.tensors().items())
    assert found.tensors().keys() == like.tensors().keys()


def lower(rank):
    return lambda t: t.update({A: t[A][:1].repeat(rank, 1), B: t[B][:, :1].repeat(1, rank)})


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_lower_rank(sent, like, rank):
    assert uploads.inspect(sent(lower(rank)), like, WHO).factors["narrow"].rank == rank


def cored(tensors):
    name = "base_model.model.encoder.layer.1.mlp.lora_"
    tensors[f"{name}A.weight"], tensors[f"{name}B.weight"] = torch.ones(2, 53), torch.ones(17, 2)


OTHERS = {
    "a higher rank": (lower(4), rf"{WHO}: tensor '{A}' has shape \(4, 14\), expected \(3, 14\)"),
    "two ranks": (lambda t: t.update({B: t[B][:, :2].clone()}), rf"{WHO}: tensor '{B}' has shape \(9, 2\), expected"),
    "a rank beside a core": (cored, rf"{WHO}: tensor '.*mlp.lora_A.weight' has shape \(2, 53\), expected \(3, 53\)"),
    "one dimension": (lambda t: t.update({A: torch.ones(42)}), rf"{WHO}: tensor '{A}' has shape \(42,\), expected"),
    "none": (lambda t: t.update({A: torch.tensor(1.0)}), rf"{WHO}: tensor '{A}' has shape \(\), expected \(3, 14\)"),
    "missing": (lambda t: t.pop(A), f"{WHO}: tensor '{A}' is missing"),
    "not expected": (lambda t: t.update({"x": torch.ones(1)}), f"{WHO}: tensor 'x' is not expected"),
    "another type": (lambda t: t.update({A: t[A].double()}), f"tensor '{A}' is of type F64; expected F32"),
    "whole numbers": (lambda t: t.update({A: t[A].int()}), f"tensor '{A}' is of type I32; expected F32"),
    "a magnitude": (
        lambda t: t.update({"base_model.model.narrow.lora_magnitude_vector": torch.ones(8)}),
        rf"{WHO}: tensor '.*narrow.lora_magnitude_vector' has shape \(8,\), expected \(9,\)",
    ),
    "the head": (
        lambda t: t.update({"base_model.model.classifier.bias": torch.ones(5)}),
        rf"{WHO}: tensor '.*classifier.bias' has shape \(5,\), expected \(4,\)",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_expected_is_refused_before_a_tensor_is_read(sent, like, monkeypatch, name):
    change, said = OTHERS[name]
    file = sent(change)
    monkeypatch.setattr(tensorfile, "load_file", lambda path: pytest.fail("tensors were read"))
    with pytest.raises(AdapterError, match=said):
        uploads.inspect(file, like, WHO)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values(sent, like, value):
    with pytest.raises(AdapterError, match=f"{WHO}: tensor '{A}' has values that are not finite"):
        uploads.inspect(sent(lambda t: t.update({A: torch.full_like(t[A], value)})), like, WHO)


def test_types_and_limits_can_be_chosen(sent, like):
    half = sent(lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    assert isinstance(uploads.inspect(half, like, WHO, dtypes=frozenset({"F16"})), Adapter)
    with pytest.raises(AdapterError, match="above the limit of 500"):
        uploads.inspect(sent(), like, WHO, limits=Limits(header_bytes=500))
