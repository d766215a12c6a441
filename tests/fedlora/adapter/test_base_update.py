"""What is added to the base: as factors while they are narrow, dense beyond; composed, stored and refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.adapter import Factors
from fedlora.adapter.base_update import FILE, BaseUpdate
from fedlora.errors import AdapterError, FedloraError

SHAPES = {"linear": (11, 7), "tall.mlp": (13, 4), "wide": (5, 12)}


def update(uploads, rank, seed=0, dtype=torch.float64, names=SHAPES):
    generator = uploads.generator(seed)
    return BaseUpdate.of({name: uploads.factors(SHAPES[name], rank, generator, dtype) for name in names})


def close(one, other):
    torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


class TestOf:
    @pytest.mark.parametrize("rank", [1, 3, 4, 5, 7, 20])
    def test_any_rank_is_kept_in_at_most_the_narrow_side(self, uploads, rank):
        """Stored in fp32; from min(d_out, d_in) on as one dense matrix beside an identity."""
        generator = uploads.generator(0)
        given = {name: uploads.factors(shape, rank, generator, torch.float64) for name, shape in SHAPES.items()}
        found = BaseUpdate.of(given)
        for name, pair in found.modules.items():
            assert pair.rank == min(rank, *SHAPES[name])
            assert pair.B.dtype == pair.A.dtype == torch.float32
            assert pair.shape == SHAPES[name]
            close(pair.product(), given[name].product())
            if rank >= min(SHAPES[name]):
                side = pair.B if pair.B.shape[0] <= pair.A.shape[1] else pair.A
                assert torch.equal(side, torch.eye(min(SHAPES[name])))

    def test_nothing_is_left_out(self, uploads):
        (pair,) = update(uploads, 2, names=["linear"]).modules.values()
        empty = Factors(pair.B[:, :0], pair.A[:0])
        assert BaseUpdate.of({"a": empty, "b": pair}).modules.keys() == {"b"}
        assert not BaseUpdate.of({"a": empty})
        assert not BaseUpdate()
        assert BaseUpdate.of({"b": pair})


class TestPlus:
    def test_composes_over_rounds_until_it_is_dense(self, uploads):
        """Rank 3 each round: 3, 6, then the narrow side for good; always the sum of what was added."""
        total, sums = BaseUpdate(), {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        for number in range(30):
            step = update(uploads, 3, number)
            before = {name: tensor.clone() for name, tensor in total.tensors().items()}
            later = total.plus(step)
            assert all(torch.equal(total.tensors()[name], tensor) for name, tensor in before.items())
            total = later
            for name, pair in total.modules.items():
                sums[name] += step.modules[name].product().double()
                assert pair.rank == min(3 * (number + 1), *SHAPES[name])
                torch.testing.assert_close(pair.product().double(), sums[name], rtol=1e-4, atol=1e-4)
                assert pair.B.dtype == torch.float32

    def test_modules_of_either(self, uploads):
        one, other = update(uploads, 1, names=["linear"]), update(uploads, 1, 1, names=["wide"])
        both = one.plus(other)
        assert both.modules.keys() == {"linear", "wide"}
        assert torch.equal(both.modules["linear"].B, one.modules["linear"].B)
        assert torch.equal(both.modules["wide"].B, other.modules["wide"].B)

    def test_nothing_more(self, uploads):
        one = update(uploads, 2)
        assert one.plus(BaseUpdate()).tensors().keys() == one.tensors().keys()
        assert BaseUpdate().plus(one).modules["wide"] is one.modules["wide"]
        assert not BaseUpdate().plus(BaseUpdate())

    def test_in_order(self, uploads):
        """Left and right blocks stay in the order in which they were added, so that files of a run are comparable."""
        one, other = update(uploads, 1), update(uploads, 1, 1)
        both = one.plus(other).modules["linear"]
        assert torch.equal(both.B, torch.cat([one.modules["linear"].B, other.modules["linear"].B], dim=1))
        assert torch.equal(both.A, torch.cat([one.modules["linear"].A, other.modules["linear"].A]))


@pytest.mark.parametrize(
    ("rank", "numbers"), [(1, 18 + 17 + 17), (2, 36 + 34 + 34), (4, 72 + 52 + 60), (9, 77 + 52 + 60)]
)
def test_wire_bytes_are_of_the_smaller_form(uploads, rank, numbers):
    """Four bytes a number: min(r(d_out + d_in), d_out·d_in) each; at rank 4 the (13, 4) and (5, 12) go dense."""
    assert update(uploads, rank).wire_bytes() == 4 * numbers


class TestFiles:
    @pytest.mark.parametrize("rank", [2, 9])
    def test_and_back(self, uploads, tmp_path, rank):
        given = update(uploads, rank)
        given.write(tmp_path)
        found = BaseUpdate.read(tmp_path)
        assert found.tensors().keys() == given.tensors().keys() == load_file(tmp_path / FILE).keys()
        assert all(torch.equal(tensor, given.tensors()[name]) for name, tensor in found.tensors().items())
        assert found.modules.keys() == given.modules.keys()

    def test_names_and_sides(self, uploads):
        """left is d_out × k and right k × d_in; a module's name may have dots."""
        tensors = update(uploads, 2, names=["tall.mlp"]).tensors()
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
            "tall.mlp.left": (13, 2),
            "tall.mlp.right": (2, 4),
        }

    @pytest.mark.parametrize("name", SHAPES)
    def test_a_dense_one_is_stored_alone(self, uploads, tmp_path, name):
        """Older files hold the identity too, and say the same."""
        given = update(uploads, 20, names=[name])
        given.write(tmp_path)
        assert {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / FILE).items()} == {
            f"{name}.dense": SHAPES[name]
        }
        (pair,) = given.modules.values()
        (tmp_path / "older").mkdir()
        save_file({f"{name}.left": pair.B, f"{name}.right": pair.A}, tmp_path / "older" / FILE)
        for found in (BaseUpdate.read(tmp_path), BaseUpdate.read(tmp_path / "older")):
            assert torch.equal(found.modules[name].B, pair.B)
            assert torch.equal(found.modules[name].A, pair.A)
            assert found.tensors().keys() == {f"{name}.dense"}

    def test_factors_of_full_rank_are_stored_as_they_are(self, uploads):
        pair = uploads.factors((5, 12), 5, uploads.generator(0))
        assert BaseUpdate({"m": pair}).tensors().keys() == {"m.left", "m.right"}
        assert torch.equal(BaseUpdate.from_tensors(BaseUpdate({"m": pair}).tensors()).modules["m"].B, pair.B)

    def test_a_dense_one_is_a_matrix(self, tmp_path):
        save_file({"linear.dense": torch.ones(3)}, tmp_path / FILE)
        with pytest.raises(AdapterError, match="module 'linear' has no"):
            BaseUpdate.read(tmp_path)

    def test_cuts_and_shared_memory_can_be_written(self, uploads, tmp_path):
        pair = update(uploads, 3, names=["linear"]).modules["linear"]
        shared = BaseUpdate({"linear": pair, "again": pair, "cut": pair.at_rank(2)})
        shared.write(tmp_path)
        assert torch.equal(BaseUpdate.read(tmp_path).modules["cut"].B, pair.B[:, :2])

    def test_no_file_is_no_update(self, tmp_path):
        assert not BaseUpdate.read(tmp_path)

    @pytest.mark.parametrize(
        ("names", "said"),
        [
            (["linear.left"], "module 'linear' has no 'right'"),
            (["linear.right"], "module 'linear' has no 'left'"),
            (["linear.middle"], "'linear.middle' is no '<module>.left', '.right' or '.dense'"),
            (["left"], "'left' is no"),
            (["dense"], "'dense' is no"),
            (["linear.dense", "linear.left"], "module 'linear' has no 'right'"),
            (["linear.left", "linear.right"], "factors do not fit"),
        ],
    )
    def test_other_content_is_refused(self, tmp_path, names, said):
        save_file({name: torch.ones(3, 2) for name in names}, tmp_path / FILE)
        with pytest.raises(AdapterError, match=said):
            BaseUpdate.read(tmp_path)

    def test_damage_is_refused(self, uploads, tmp_path):
        update(uploads, 2).write(tmp_path)
        content = (tmp_path / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(content[: len(content) // 2])
        with pytest.raises(AdapterError, match="cannot be read as safetensors"):
            BaseUpdate.read(tmp_path)

    def test_where_nothing_can_be_written(self, uploads, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(FedloraError, match="cannot write"):
            update(uploads, 2).write(tmp_path / "file")
