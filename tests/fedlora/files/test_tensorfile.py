"""Tensors as safetensors bytes and files, and files that are refused."""

import pickle

import pytest
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.errors import AdapterError
from fedlora.files.limits import OWN
from fedlora.files.tensorfile import StoredTensors, read_tensors, serialise


class TestSerialise:
    def test_views_are_written_whole(self, tmp_path):
        """Transposes and slices share memory with more than themselves."""
        whole = torch.arange(24.0).reshape(4, 6)
        adapter = Adapter({"m": Factors(whole.T[:, :2], whole[:2, ::2])})
        (tmp_path / "a.safetensors").write_bytes(serialise(adapter.tensors()))
        back = Adapter.from_tensors(read_tensors(tmp_path / "a.safetensors")).factors["m"]
        assert torch.equal(back.B, whole.T[:, :2])
        assert torch.equal(back.A, whole[:2, ::2])


class TestUnreadableFiles:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "adapter_model.safetensors"

    def refused(self, path):
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors cannot be read as safetensors"):
            read_tensors(path)

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_truncated(self, uploads, path, keep):
        path.write_bytes(serialise(uploads.adapter(0).tensors())[:keep])
        self.refused(path)

    def test_not_safetensors(self, path):
        path.write_bytes(b"PK\x03\x04 this is a zip file, or says so" * 50)
        self.refused(path)

    def test_pickle_is_not_run(self, path, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (tmp_path.joinpath("executed").touch, ())

        path.write_bytes(pickle.dumps(Bomb()))
        self.refused(path)
        torch.save({"q.lora_A.weight": torch.zeros(2, 2)}, path)
        self.refused(path)
        assert not (tmp_path / "executed").exists()

    def test_missing(self, path):
        self.refused(path)


class TestStored:
    """Tensors that are read from their places in a file, each time they are asked for."""

    def test_values_are_those_of_the_library(self, tmp_path):
        path, g = tmp_path / "a.safetensors", torch.Generator().manual_seed(0)
        shapes = {"scalar": (), "row": (5,), "matrix": (3, 7), "box": (2, 3, 4), "empty": (0, 3)}
        types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
        tensors = {
            f"{name} {dtype}": (100 * torch.rand(shape, generator=g)).to(dtype)
            for name, shape in shapes.items()
            for dtype in types
        }
        path.write_bytes(serialise(tensors, {"format": "pt"}))
        stored, expected = StoredTensors(path, OWN), read_tensors(path)
        for found in (dict(stored.each()), dict(stored.items()), {name: stored[name] for name in stored}):
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                assert tensor.dtype == expected[name].dtype
                assert torch.equal(tensor, expected[name])

    @pytest.mark.parametrize(
        "change",
        [
            lambda path, content: path.write_bytes(content[:-4]),
            lambda path, content: path.write_bytes(content + b"more"),
            lambda path, content: (
                (path.unlink(), path.with_suffix(".new").write_bytes(content)) and path.with_suffix(".new").rename(path)
            ),
            lambda path, content: path.unlink(),
        ],
        ids=["cut", "longer", "another", "gone"],
    )
    def test_a_file_that_is_not_what_it_was_is_refused(self, uploads, tmp_path, change):
        path = tmp_path / "a.safetensors"
        content = serialise(uploads.adapter(0).tensors())
        path.write_bytes(content)
        stored = StoredTensors(path)
        assert len(dict(stored.items())) == len(stored)
        change(path, content)
        with pytest.raises(AdapterError, match=r"a\.safetensors cannot be read as safetensors: "):
            stored.read(list(stored))
