"""Adapters as PEFT folders, read and written by PEFT itself."""

import json

import peft
import pytest
import torch

from fedlora.adapter import Adapter
from fedlora.errors import AdapterError
from fedlora.exchange.peftfolder import read_peft_folder, write_peft_folder


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)

    def forward(self, x):
        return self.head(torch.relu(self.first(x)))


class TestPeftFolder:
    @pytest.fixture
    def config(self):
        return {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["first"], "modules_to_save": ["head"]}

    @pytest.fixture
    def adapter(self, uploads):
        g = uploads.generator(0)
        head = {"head.weight": torch.randn(3, 7, generator=g), "head.bias": torch.randn(3, generator=g)}
        return Adapter({"first": uploads.factors((7, 5), 2, g)}, head)

    def test_and_back(self, adapter, config, tmp_path):
        write_peft_folder(adapter, tmp_path / "new" / "adapter", config, "# A card\n")
        back = read_peft_folder(tmp_path / "new" / "adapter").tensors()
        assert back.keys() == adapter.tensors().keys()
        assert all(torch.equal(tensor, back[name]) for name, tensor in adapter.tensors().items())
        assert json.loads((tmp_path / "new/adapter/adapter_config.json").read_text()) == config
        assert (tmp_path / "new/adapter/README.md").read_text() == "# A card\n"

    def test_peft_computes_what_the_factors_say(self, adapter, config, tmp_path):
        """(W0 + α/r·BA)x + b in the adapted layer, and the head replaced."""
        write_peft_folder(adapter, tmp_path, config, "")
        base = Tiny()
        x, pair = torch.randn(4, 5), adapter.factors["first"]
        hidden = x @ (base.first.weight + 3 * pair.B @ pair.A).T + base.first.bias
        wanted = torch.relu(hidden) @ adapter.head["head.weight"].T + adapter.head["head.bias"]
        torch.testing.assert_close(
            peft.PeftModel.from_pretrained(base, tmp_path)(x), wanted.detach(), rtol=1e-5, atol=1e-5
        )

    def test_what_peft_writes_is_read(self, adapter, config, tmp_path):
        write_peft_folder(adapter, tmp_path / "ours", config, "")
        peft.PeftModel.from_pretrained(Tiny(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
        back = read_peft_folder(tmp_path / "theirs").tensors()
        assert back.keys() == adapter.tensors().keys()
        assert all(torch.equal(tensor, back[name]) for name, tensor in adapter.tensors().items())

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors cannot be read"):
            read_peft_folder(tmp_path)
