"""Tensors as safetensors bytes and files, and files that are refused."""

import pickle

import pytest
import torch

from fedlora.adapter import Adapter, Factors
from fedlora.errors import AdapterError
from fedlora.files.tensorfile import read_tensors, serialise


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
