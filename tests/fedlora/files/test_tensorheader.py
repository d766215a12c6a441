"""What a safetensors file may say of itself, before any of its tensors has memory."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save

from fedlora.errors import AdapterError
from fedlora.files.limits import OWN, UPLOAD, Limits
from fedlora.files.tensorfile import StoredTensors, read_tensors
from fedlora.files.tensorheader import read_header


def entry(shape=(2,), place=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


def file(header, values=8, length=None):
    """The bytes of a file with that header, as JSON or text."""
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + b"\0" * values


@pytest.fixture
def read(tmp_path):
    def of(content, limits=UPLOAD):
        (tmp_path / "a.safetensors").write_bytes(content)
        return read_header(tmp_path / "a.safetensors", limits)

    return of


def test_says_what_the_library_says(read, tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.float64), "c.d": torch.zeros(1, 2, 4).half()}
    found = read(save(tensors, {"format": "pt"}))
    assert {name: tensor.shape for name, tensor in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {name: tensor.dtype for name, tensor in found.items()} == {"a": "F32", "b": "F64", "c.d": "F16"}
    assert StoredTensors(tmp_path / "a.safetensors").shapes == {name: tensor.shape for name, tensor in found.items()}


A, B = '"a":' + json.dumps(entry()), '"a":' + json.dumps(entry(place=(8, 16)))
REFUSED = {
    "nothing": (b"", r"a header of 0 bytes in a file of 0; cut off"),
    "header of an exabyte": (file({}, length=2**60), r"a header of \d+ bytes in a file of"),
    "header of a list": (file("[]", 0), "its header is no JSON object"),
    "nested header": (file("[" * 100_000, 0), "more than the 100000 tensors|nested"),
    "values behind": (file({"a": entry()}, 9), "its tensors need 8 bytes, but there are 9"),
    "values missing": (file({"a": entry()}, 7), "its tensors need 8 bytes, but there are 7"),
    "a gap": (file({"a": entry(place=(4, 12))}, 12), "overlap, or leave a gap, at byte 0"),
    "an overlap": (file({"a": entry(), "b": entry()}), "overlap, or leave a gap, at byte 0"),
    "an entry twice": (file(f"{{{A},{B}}}", 16), "key 'a' is there twice"),
    "a dimension of 2**40": (file({"a": entry([2**40, 2**40])}), r"of shape \[1099511627776, 1099.*\] in 8 bytes"),
    "a negative dimension": (file({"a": entry([-1, -2])}), r"has the shape \[-1, -2\]"),
    "a dimension that is true": (file({"a": entry([True, 2])}), r"has the shape \[True, 2\]"),
    "a dimension in words": (file({"a": entry(["2"])}), r"has the shape \['2'\]"),
    "an endless number": (file('{"a":{"dtype":"F32","shape":[%s]}}' % ("9" * 5000)), "cannot be read as safetensors"),
    "offsets the wrong way": (file({"a": entry(place=(8, 0))}), r"lies at \[8, 0\]"),
    "another key": (file({"a": entry() | {"x": 1}}), "is not described by dtype, shape and data_offsets"),
    "no type": (file({"a": entry(dtype=None)}), "is of type None"),
    "metadata of numbers": (file({"__metadata__": {"a": 1}, "a": entry()}), "__metadata__ is not text by name"),
    "not UTF-8": (file({"a": entry()})[:9] + b"\xff" + file({"a": entry()})[10:], "codec can't decode"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_content_is_refused(read, name):
    content, said = REFUSED[name]
    with pytest.raises(AdapterError, match=said) as refused:
        read(content)
    assert "cannot be read as safetensors" in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("shape", [(0, 2**40), (2**40, 0), (0,), (3, 0)])
def test_a_dimension_of_zero_is_refused_with_whatever_stands_beside_it(read, shape):
    """The size of the file says nothing about the other side, to which a rank may be filled up later."""
    with pytest.raises(AdapterError, match=r"has shape \(.*\); expected dimensions from 1"):
        read(file({"a": entry(shape, (0, 0))}, 0))


def test_what_is_our_own_may_have_empty_tensors_but_no_giants_beside(read):
    assert read(file({"a": entry((0, 5), (0, 0))}, 0), OWN)["a"].shape == (0, 5)
    with pytest.raises(AdapterError, match="expected dimensions from 1"):
        read(file({"a": entry((0, 2**40), (0, 0))}, 0), OWN)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (Limits(header_bytes=100), "its header of 123 bytes is above the limit of 100"),
        (Limits(tensors=1), "holds 2 tensors; at most 1 are allowed|more than the 1 tensors"),
        (Limits(total_bytes=100), "its 147 bytes are above the limit of 100"),
        (Limits(dtypes=frozenset({"F16"})), "tensor 'a' is of type F32; expected F16"),
    ],
)
def test_limits(read, limits, said):
    content = file({"a": entry(), "b": entry(place=(8, 16))}, 16)
    assert len(read(content)) == 2
    with pytest.raises(AdapterError, match=said):
        read(content, limits)


@pytest.mark.parametrize(
    ("name", "said"),
    [("x\n\x1b[2J", r"'x\\n\\x1b\[2J'.* cannot be printed"), ("", "cannot"), ("n" * 501, "is longer than 500")],
)  # fmt: skip
def test_names(read, name, said):
    with pytest.raises(AdapterError, match=said) as refused:
        read(file({name: entry()}))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_opened(tmp_path, make):
    """A pipe would be waited for, for ever."""
    make(tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="cannot be read as safetensors: not a file"):
        read_tensors(tmp_path / "a.safetensors")


def test_a_header_is_refused_before_it_is_taken_apart(read):
    """JSON of 15 MB would be some hundred of objects."""
    many = "{" + ",".join(f'"{index:x}":0' for index in range(1_200_000)) + "}"
    with pytest.raises(AdapterError, match="more than the 100000 tensors that are allowed"):
        read(file(many, 0))
