"""Adapters as values: names, kinds, shapes, ranks, bytes."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapter.weights import Adapter, Factors, parse_name, wire_size
from fedlora.errors import AdapterError
from fedlora.files.tensorfile import read_tensors, serialise


class TestNames:
    @pytest.mark.parametrize(
        ("name", "part", "module", "kind"),
        [
            ("base_model.model.encoder.layer.0.query.lora_A.weight", "A", "encoder.layer.0.query", "linear"),
            ("base_model.model.encoder.layer.0.query.lora_B.weight", "B", "encoder.layer.0.query", "linear"),
            ("query.lora_B.weight", "B", "query", "linear"),
            ("base_model.model.wte.lora_embedding_A", "A", "wte", "embedding"),
            ("wte.lora_embedding_B", "B", "wte", "embedding"),
            ("base_model.model.query.hira_A", "A", "query", "hira"),
            ("query.hira_B", "B", "query", "hira"),
            ("wte.hira_embedding_A", "A", "wte", "hira_embedding"),
            ("wte.hira_embedding_B", "B", "wte", "hira_embedding"),
            ("base_model.model.query.lora_magnitude_vector", "magnitude", "query", "linear"),
            ("query.lora_magnitude_vector.weight", "magnitude", "query", "linear"),
            ("base_model.model.query.lora_core", "core", "query", "linear"),
            ("base_model.model.classifier.weight", "head", "classifier.weight", "linear"),
            ("flora_net.bias", "head", "flora_net.bias", "linear"),
            ("base_model.model.lora_net.weight", "head", "lora_net.weight", "linear"),
            ("hira_net.bias", "head", "hira_net.bias", "linear"),
            ("my.lora_A.weight.lora_B.weight", "B", "my.lora_A.weight", "linear"),
        ],
    )
    def test_parts(self, name, part, module, kind):
        assert parse_name(name) == (part, module, kind)

    @pytest.mark.parametrize(
        "name",
        [
            "q.lora_A.default.weight",
            "q.lora_A.bias",
            "q.lora_A",
            "q.hira_A.weight",
            "q.lora_embedding_A.weight",
            "q.hira_magnitude_vector",
            "q.lora_C.weight",
        ],
    )
    def test_adapters_of_other_kinds_are_refused(self, name):
        with pytest.raises(AdapterError, match=f"parameter '{name}' is not understood; expected factors"):
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

    @pytest.mark.parametrize("rank", [1, 2, 3, 5])
    def test_another_rank_keeps_the_first_indices_and_is_filled_with_zeros(self, uploads, rank):
        pair = uploads.adapter(0).factors["narrow"]
        other = pair.at_rank(rank)
        kept = min(rank, 3)
        assert (other.rank, other.shape) == (rank, pair.shape)
        assert torch.equal(other.B[:, :kept], pair.B[:, :kept])
        assert torch.equal(other.A[:kept], pair.A[:kept])
        assert not other.B[:, kept:].any()
        assert not other.A[kept:].any()

    def test_cut_never_fills_up(self, uploads):
        adapter = uploads.adapter(0)
        mixed = adapter.with_factors({**adapter.factors, "narrow": adapter.factors["narrow"].at_rank(1)})
        assert [pair.rank for pair in mixed.cut(2).factors.values()] == [2, 2, 1]
        assert [pair.rank for pair in adapter.cut_like(mixed).factors.values()] == [3, 3, 1]
        assert [pair.rank for pair in mixed.cut_like(adapter).factors.values()] == [3, 3, 1]
        assert mixed.cut(1).head.keys() == adapter.head.keys()


@pytest.fixture(scope="module")
def mixed(uploads):
    """An adapter with factors of every kind, magnitudes and a head."""
    kinds = {"emb": "embedding", "gated": "hira", "gated_emb": "hira_embedding"}
    shapes = {"plain": (5, 7), "emb": (4, 30), "gated": (6, 3), "gated_emb": (4, 20)}
    g = uploads.generator(0)
    return Adapter(
        {module: uploads.factors(shape, 2, g) for module, shape in shapes.items()},
        {"classifier.bias": torch.randn(3, generator=g)},
        {"plain": torch.rand(5, generator=g), "emb": torch.rand(4, generator=g)},
        kinds,
    )


class TestKinds:
    def test_and_back(self, mixed):
        back = Adapter.from_tensors(mixed.tensors())
        assert back.kinds == mixed.kinds
        assert back.magnitudes.keys() == mixed.magnitudes.keys()
        assert list(back.tensors()) == list(mixed.tensors())
        assert all(torch.equal(t, back.tensors()[name]) for name, t in mixed.tensors().items())

    def test_survive_a_cut(self, mixed):
        assert list(mixed.cut(1).tensors()) == list(mixed.tensors())
        assert {pair.rank for pair in mixed.cut(1).factors.values()} == {1}

    @pytest.mark.parametrize(
        ("parts", "count"), [({"A"}, 4), ({"magnitude"}, 2), ({"B", "magnitude"}, 6), ({"magnitude", "head"}, 3)]
    )
    def test_parts(self, mixed, parts, count):
        chosen = mixed.tensors(frozenset(parts))
        assert len(chosen) == count
        assert {parse_name(name).part for name in chosen} == parts

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.update({"plain.hira_A": t.pop("plain.lora_A.weight")}), "'plain' has factors of two kinds"),
            (lambda t: t.pop("emb.lora_embedding_B"), "module 'emb' has no lora_embedding_B"),
            (lambda t: t.pop("gated.hira_A"), "module 'gated' has no hira_A"),
            (
                lambda t: t.update({"x.lora_magnitude_vector": torch.ones(2)}),
                "'x' has a magnitude vector or a core, but no",
            ),
        ],
    )
    def test_what_does_not_belong_together(self, mixed, change, message):
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in mixed.tensors().items()}
        change(tensors)
        with pytest.raises(AdapterError, match=message):
            Adapter.from_tensors(tensors)

    @pytest.mark.parametrize("shape", [(2, 2), (2, 1, 1)])
    def test_a_core_is_a_part_of_its_own_and_can_be_folded_in(self, mixed, shape):
        """r × r, or the diagonal blocks of a block-diagonal one."""
        core = torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)
        plain = mixed.factors["plain"]
        alone = Adapter({"plain": plain}, mixed.head)
        with_core = replace(alone, cores={"plain": core})
        assert list(with_core.tensors(frozenset({"core"}))) == ["base_model.model.plain.lora_core"]
        back = Adapter.from_tensors(with_core.tensors())
        assert torch.equal(back.cores["plain"], core)
        between = core if core.ndim == 2 else torch.diag(core.ravel())
        folded = back.folded()
        torch.testing.assert_close(folded.factors["plain"].product(), plain.B @ between @ plain.A)
        assert list(folded.tensors()) == list(alone.tensors())

    def test_magnitudes_are_sent_with_the_factors_and_not_with_the_head(self, mixed):
        with_them, head = wire_size(mixed, frozenset({"A", "B", "magnitude", "head"}))
        without, same = wire_size(mixed, frozenset({"A", "B", "head"}))
        assert 4 * 9 < with_them - without < 4 * 9 + 400
        assert head == same > 0


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

    @pytest.mark.parametrize(("rank", "refused"), [(1, False), (3, False), (4, True)])
    def test_a_lower_rank_where_it_is_allowed(self, uploads, rank, refused):
        full = uploads.adapter(0)
        given = full.with_factors({m: pair.at_rank(rank) for m, pair in full.factors.items()})
        with pytest.raises(AdapterError, match="has shape") if refused else contextlib.nullcontext():
            given.check_like(full, "client 7, round 3", lower_rank=True)
        with pytest.raises(AdapterError, match="has shape") if rank != 3 else contextlib.nullcontext():
            given.check_like(full, "client 7, round 3")

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

    @given(st.data())
    def test_wire_size_is_that_of_serialised_tensors_of_any_shape_and_type(self, data):
        """Also cut to a lower rank, where the values lie apart, and of several types in one file."""
        names = st.text(st.sampled_from("ab.0é'\"\\\x7f\n"), min_size=1, max_size=9).map("m{}".format)
        sizes, dtypes = st.integers(1, 40), st.sampled_from([torch.float32, torch.float16, torch.float64])
        factors = {
            name: Factors(torch.ones(data.draw(sizes), 5, dtype=dtype), torch.ones(5, data.draw(sizes), dtype=dtype))
            for name in data.draw(st.sets(names, min_size=1, max_size=12))
            for dtype in [data.draw(dtypes)]
        }
        head = {"head": torch.ones(data.draw(st.lists(sizes, max_size=3)), dtype=data.draw(dtypes))}
        adapter = Adapter(factors, head if data.draw(st.booleans()) else {}).cut(data.draw(st.integers(1, 5)))
        named = [adapter.tensors(frozenset(parts)) for parts in ({"A", "B"}, {"head"})]
        expected = tuple(len(serialise(tensors)) if tensors else 0 for tensors in named)
        assert wire_size(adapter, frozenset({"A", "B", "head"})) == expected

    def test_wire_size_is_four_bytes_a_parameter_and_a_header(self, uploads):
        """Per module r(d_out + d_in) parameters of 4 bytes."""
        parameters = sum(3 * (d_out + d_in) for d_out, d_in in uploads.modules.values())
        factors, head = wire_size(uploads.adapter(0), frozenset({"A", "B", "head"}))
        assert 0 < factors - 4 * parameters < 150 * 6
        assert 0 < head - 4 * (4 * 6 + 4) < 150 * 2
