"""Adapters as values: names, shapes, bytes, and the PEFT folder that PEFT itself loads."""

import json
import pickle

import peft
import pytest
import torch

from fedlora.adapter import (
    Adapter,
    Factors,
    parse_name,
    read_peft_folder,
    read_tensors,
    serialise,
    wire_size,
    write_peft_folder,
)
from fedlora.errors import AdapterError


class TestNames:
    @pytest.mark.parametrize(
        ("name", "part", "module"),
        [
            ("base_model.model.encoder.layer.0.query.lora_A.weight", "A", "encoder.layer.0.query"),
            ("base_model.model.encoder.layer.0.query.lora_B.weight", "B", "encoder.layer.0.query"),
            ("query.lora_B.weight", "B", "query"),
            ("base_model.model.classifier.weight", "head", "classifier.weight"),
            ("flora_net.bias", "head", "flora_net.bias"),
            ("base_model.model.lora_net.weight", "head", "lora_net.weight"),
            ("my.lora_A.weight.lora_B.weight", "B", "my.lora_A.weight"),
        ],
    )
    def test_parts(self, name, part, module):
        assert parse_name(name) == (part, module)

    @pytest.mark.parametrize(
        "name", ["q.lora_magnitude_vector", "emb.lora_embedding_A", "q.lora_A.default.weight", "q.lora_A.bias"]
    )
    def test_adapters_of_other_kinds_are_refused(self, name):
        with pytest.raises(AdapterError, match=f"parameter '{name}' is not a factor of a linear layer"):
            parse_name(name)


class TestShapes:
    @pytest.mark.parametrize(
        ("b", "a"), [((5, 2), (3, 7)), ((2, 5), (2, 7)), ((5,), (1, 7)), ((5, 2), (2, 7, 1)), ((5, 2), (7, 2))]
    )
    def test_factors_that_do_not_fit(self, b, a):
        with pytest.raises(AdapterError, match="factors do not fit"):
            Factors(torch.zeros(b), torch.zeros(a))

    def test_ranks(self, uploads):
        mixed = Adapter({"a": Factors(torch.zeros(5, 2), torch.zeros(2, 7)), "b": uploads.adapter(0).factors["narrow"]})
        assert (mixed.factors["a"].rank, mixed.rank) == (2, 3)
        assert Adapter({}).rank == 0

    def test_product_by_hand(self):
        pair = Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]]))
        assert pair.product().tolist() == [[3, 4, 5], [6, 8, 10]]


class TestTensors:
    def test_and_back(self, uploads):
        adapter = uploads.adapter(0)
        back = Adapter.from_tensors(adapter.tensors())
        assert back.modules == adapter.modules
        assert all(torch.equal(t, back.tensors()[name]) for name, t in adapter.tensors().items())
        assert back.head.keys() == adapter.head.keys()

    def test_names_are_pefts(self, uploads):
        names = list(uploads.adapter(0).tensors())
        assert names[:2] == [f"base_model.model.encoder.layer.0.query.lora_{part}.weight" for part in "AB"]
        assert names[-2:] == ["base_model.model.classifier.bias", "base_model.model.classifier.weight"]

    @pytest.mark.parametrize(("parts", "count"), [({"A"}, 3), ({"B", "head"}, 5), ({"head"}, 2), (set(), 0)])
    def test_of_the_parts_asked_for(self, uploads, parts, count):
        chosen = uploads.adapter(0).tensors(frozenset(parts))
        assert len(chosen) == count
        assert {parse_name(name).part for name in chosen} == parts

    @pytest.mark.parametrize(("missing", "said"), [("lora_A", "lora_A"), ("lora_B", "lora_B")])
    def test_half_a_module(self, uploads, missing, said):
        tensors = uploads.adapter(0).tensors()
        del tensors[f"base_model.model.narrow.{missing}.weight"]
        with pytest.raises(AdapterError, match=f"module 'narrow' has no {said}"):
            Adapter.from_tensors(tensors)

    def test_no_module(self):
        with pytest.raises(AdapterError, match="no LoRA factors among the tensors"):
            Adapter.from_tensors({"base_model.model.classifier.weight": torch.zeros(2, 2)})

    def test_factors_swapped(self):
        with pytest.raises(AdapterError, match="factors do not fit"):
            Adapter.from_tensors({"q.lora_A.weight": torch.zeros(7, 3), "q.lora_B.weight": torch.zeros(3, 5)})


class TestCheckLike:
    A = "base_model.model.narrow.lora_A.weight"

    def refused(self, uploads, change, message):
        tensors = uploads.adapter(1).tensors()
        change(tensors)
        with pytest.raises(AdapterError, match=message):
            Adapter.from_tensors(tensors).check_like(uploads.adapter(0), "client 7, round 3")

    def test_like(self, uploads):
        uploads.adapter(1).check_like(uploads.adapter(0), "client 7, round 3")

    def test_shape(self, uploads):
        message = rf"client 7, round 3: tensor '{self.A}' has shape \(3, 15\), expected \(3, 14\)"
        self.refused(uploads, lambda t: t.update({self.A: torch.zeros(3, 15)}), message)

    def test_missing(self, uploads):
        name = "base_model.model.classifier.bias"
        self.refused(uploads, lambda t: t.pop(name), f"client 7, round 3: tensor '{name}' is missing")

    def test_not_expected(self, uploads):
        message = "client 7, round 3: tensor 'base_model.model.odd' is not expected"
        self.refused(uploads, lambda t: t.update({"base_model.model.odd": torch.zeros(1)}), message)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite(self, uploads, value):
        message = f"client 7, round 3: tensor '{self.A}' has values that are not finite"
        self.refused(uploads, lambda t: t[self.A][1].fill_(value), message)


class TestBytes:
    @pytest.mark.parametrize("parts", [{"A", "B", "head"}, {"B", "head"}, {"B"}, {"head"}, set()])
    def test_wire_size_is_the_size_of_what_is_written(self, uploads, tmp_path, parts):
        adapter, path, sizes = uploads.adapter(0), tmp_path / "sent.safetensors", [0, 0]
        for index, kept in enumerate((parts - {"head"}, parts & {"head"})):
            if kept:
                path.write_bytes(serialise(adapter.tensors(frozenset(kept))))
                sizes[index] = path.stat().st_size
                assert read_tensors(path).keys() == adapter.tensors(frozenset(kept)).keys()
        assert wire_size(adapter, frozenset(parts)) == tuple(sizes)

    def test_wire_size_is_four_bytes_a_parameter_and_a_header(self, uploads):
        """Per module r(d_out + d_in) parameters of 4 bytes."""
        parameters = sum(3 * (d_out + d_in) for d_out, d_in in uploads.modules.values())
        factors, head = wire_size(uploads.adapter(0), frozenset({"A", "B", "head"}))
        assert 0 < factors - 4 * parameters < 150 * 6
        assert 0 < head - 4 * (4 * 6 + 4) < 150 * 2

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
