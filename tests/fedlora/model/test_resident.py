"""Adapters of every variant attached to every kind of layer, and a frozen base that strategies change."""

import copy
import json
from dataclasses import replace

import peft
import pytest
import torch

from fedlora.adapter.base_update import BaseUpdate
from fedlora.adapter.weights import EVERY_PART, Adapter, Factors, parse_name
from fedlora.config import ModelConfig
from fedlora.config.lora import LoraConfig
from fedlora.errors import ModelError
from fedlora.exchange.peftfolder import write_peft_folder
from fedlora.model import base as model
from fedlora.model.resident import ResidentModel, add_to_weight
from fedlora.model.targets import stores_transposed
from fedlora.objective.classification import OBJECTIVE

LABELS = ["cat", "dog", "hen"]
CPU = torch.device("cpu")
PAD = 0
LAYERS = {
    "linear": ("llama", ["q_proj", "v_proj"]),
    "conv1d": ("gpt2", ["c_attn", "attn.c_proj"]),
    "embedding": ("bert", ["word_embeddings"]),
}
"""What holds each kind of layer, and its names: v_proj is 8 × 16, c_attn 48 × 16, the embedding 16 × 99;
q_proj and c_proj are square, so that nothing can be told by shape."""
VARIANTS = ("lora", "rslora", "dora", "hira")
EVERY = [(variant, layer) for variant in VARIANTS for layer in LAYERS]


def build(folder, seed: int = 0, dtype: str = "fp32", **lora) -> ResidentModel:
    config = ModelConfig(name=str(folder), pooling="head", dtype=dtype)
    return ResidentModel.build(OBJECTIVE, config, LoraConfig(**{"rank": 2, "alpha": 6, **lora}), LABELS, PAD, seed, CPU)


@pytest.fixture
def of_layer(folders):
    """`of_layer("conv1d", variant="hira")`: a resident model with that kind of layer adapted."""

    def make(layer, **options) -> ResidentModel:
        name, targets = LAYERS[layer]
        return build(folders[name], target_modules=targets, **options)

    return make


def randomised(resident: ResidentModel, seed: int = 3, scale: float = 0.5) -> Adapter:
    """The resident model's adapter with other values everywhere, B included; magnitudes stay positive."""
    g = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in resident.read().tensors().items():
        drawn = scale * torch.randn(tensor.shape, generator=g)
        changed[name] = tensor * drawn.exp() if parse_name(name).part == "magnitude" else drawn
    return Adapter.from_tensors(changed)


def same(one: Adapter, other: Adapter) -> bool:
    a, b = one.tensors(), other.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def by_hand(resident: ResidentModel, adapter: Adapter, lora: LoraConfig) -> torch.nn.Module:
    """The plain base with the adapter worked into its weights, from the formulas of the papers."""
    network = model.load_base(ModelConfig(name=resident.name, pooling="head"), LABELS, PAD)
    network.load_state_dict({**network.state_dict(), **adapter.head})
    for module, pair in adapter.factors.items():
        layer = network.get_submodule(module)
        weight = layer.weight.detach()
        weight = weight.T if stores_transposed(layer) else weight
        if lora.variant == "hira":
            new = weight + weight * (pair.B @ pair.A)
        else:
            new = weight + lora.scaling * (pair.B @ pair.A)
        if lora.variant == "dora":
            new = adapter.magnitudes[module][:, None] * new / new.norm(dim=1, keepdim=True)
        layer.weight.data = (new.T if stores_transposed(layer) else new).contiguous()
    return network


def base_weights(resident: ResidentModel) -> dict[str, torch.Tensor]:
    """Copies of everything that is frozen."""
    trained = {id(parameter) for parameter in resident._handles.values()}
    return {n: p.detach().clone() for n, p in resident.peft.named_parameters() if id(p) not in trained}


class TestEveryVariantOnEveryLayer:
    @pytest.mark.parametrize(("variant", "layer"), EVERY)
    def test_names_are_those_that_peft_saves(self, of_layer, variant, layer):
        resident = of_layer(layer, variant=variant)
        saved = peft.get_peft_model_state_dict(resident.peft, save_embedding_layers=False)
        mine = resident.read().tensors()
        assert mine.keys() == saved.keys()
        assert all(torch.equal(mine[key], saved[key]) for key in saved)
        assert bool(resident.read().magnitudes) == (variant == "dora")

    @pytest.mark.parametrize(("variant", "layer"), EVERY)
    def test_what_is_loaded_is_read_back_and_what_is_read_is_a_copy(self, of_layer, variant, layer):
        resident = of_layer(layer, variant=variant)
        adapter = randomised(resident)
        resident.load(adapter)
        first = resident.read()
        assert same(first, adapter)
        resident.load(randomised(resident, seed=4))
        assert same(first, adapter)

    @pytest.mark.parametrize(("variant", "layer"), EVERY)
    def test_the_forward_pass_is_that_of_the_paper(self, of_layer, variant, layer, logits, tokens):
        """PEFT's forward pass against weights that were changed by hand (alpha ≠ rank)."""
        options = {"rank": 3, "alpha": 7, "variant": variant}
        resident = of_layer(layer, **options)
        adapter = randomised(resident)
        resident.load(adapter)
        expected = logits(by_hand(resident, adapter, LoraConfig(**options)), tokens())
        torch.testing.assert_close(logits(resident.peft, tokens()), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(("variant", "layer"), EVERY)
    def test_the_exported_folder_gives_the_same_logits_in_plain_peft(
        self, of_layer, variant, layer, logits, tokens, tmp_path
    ):
        resident = of_layer(layer, variant=variant, rank=2, alpha=7, ranks=[5, 3])
        adapter = randomised(resident)
        resident.load(adapter)
        write_peft_folder(adapter, tmp_path, resident.peft_config(), "")
        base = model.load_base(ModelConfig(name=resident.name, pooling="head"), LABELS, PAD)
        plain = peft.PeftModel.from_pretrained(base, str(tmp_path))
        assert torch.equal(logits(plain, tokens()), logits(resident.peft, tokens()))

    @pytest.mark.parametrize(("variant", "layer"), EVERY)
    def test_a_fresh_adapter_changes_nothing_and_b_is_what_is_zero(self, of_layer, variant, layer, logits, tokens):
        """Also of embeddings, whose A it is that PEFT starts at zero: what trains B alone would learn nothing there."""
        resident = of_layer(layer, variant=variant)
        fresh = resident.read()
        assert all(pair.A.any(dim=1).all() and not pair.B.any() for pair in fresh.factors.values())
        untouched = model.load_base(ModelConfig(name=resident.name, pooling="head"), LABELS, PAD)
        torch.testing.assert_close(logits(resident.peft, tokens()), logits(untouched, tokens()), atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("parts", [{"B", "head"}, {"A"}, {"magnitude"}, {"A", "B", "magnitude", "head"}, set()])
    @pytest.mark.parametrize("layer", LAYERS)
    def test_trainable_freezes_everything_else(self, of_layer, layer, parts):
        for variant in ("dora", "hira"):
            resident = of_layer(layer, variant=variant)
            resident.trainable(EVERY_PART)
            chosen = resident.trainable(frozenset(parts))
            wanted = [name for name in resident.read().tensors() if parse_name(name).part in parts]
            assert len(chosen) == len(wanted)
            assert {id(p) for p in chosen} == {id(p) for p in resident.peft.parameters() if p.requires_grad}

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("name", ["gpt2", "llama"])
    def test_bf16_is_the_bases_precision_and_not_the_adapters(self, folders, name, variant, logits, tokens):
        resident = build(folders[name], dtype="bf16", variant=variant)
        trained = {id(p) for p in resident._handles.values()}
        for parameter_name, p in resident.peft.named_parameters():
            head = ".original_module." in parameter_name
            assert p.dtype == (torch.float32 if id(p) in trained or head else torch.bfloat16), parameter_name
        adapter = randomised(resident, scale=0.3)
        resident.load(adapter)
        with resident.autocast():
            assert torch.is_autocast_enabled("cpu")
            in_training = logits(resident.peft, tokens())
        assert torch.isfinite(in_training).all()
        # Outside of autocast too: this is how somebody uses it afterwards.
        torch.testing.assert_close(logits(resident.peft, tokens()).float(), in_training.float(), atol=0.05, rtol=0.05)
        assert same(resident.read(), adapter)  # no rounding on the way


class TestRanks:
    @pytest.mark.parametrize(("variant", "layer"), EVERY)
    def test_a_lower_rank_is_the_model_attached_at_that_rank(self, of_layer, variant, layer, logits, tokens):
        """The scaling stays that of alpha and rank, whatever the rank that is attached."""
        low = of_layer(layer, variant=variant, rank=2, alpha=7)
        high = of_layer(layer, variant=variant, rank=2, alpha=7, ranks=[2, 5])
        adapter = randomised(low)
        high.load(randomised(high))  # what must not shine through
        for resident in (low, high):
            resident.load(adapter)
        torch.testing.assert_close(logits(high.peft, tokens()), logits(low.peft, tokens()), atol=1e-6, rtol=1e-5)
        assert {pair.rank for pair in high.read().factors.values()} == {5}
        assert same(high.read().cut(2), adapter)
        assert not any(pair.A[2:].any() or pair.B[:, 2:].any() for pair in high.read().factors.values())

    @pytest.mark.parametrize(("variant", "written"), [("lora", 3.5 * 5), ("rslora", 7 / 2**0.5 * 5**0.5)])
    def test_alpha_is_written_for_the_highest_rank(self, folders, tmp_path, variant, written):
        resident = build(folders["gpt2"], variant=variant, rank=2, alpha=7, ranks=[5, 2])
        (tmp_path / "adapter_config.json").write_text(json.dumps(resident.peft_config()))
        loaded = peft.LoraConfig.from_pretrained(tmp_path)
        assert (loaded.r, loaded.lora_alpha) == (5, pytest.approx(written))
        assert (loaded.use_rslora, loaded.inference_mode) == (variant == "rslora", True)
        assert loaded.base_model_name_or_path == str(folders["gpt2"])
        assert "score" in loaded.modules_to_save

    @pytest.mark.parametrize(
        ("options", "key"),
        [
            ({"rank": 9}, "lora.rank=9"),
            ({"rank": 2, "ranks": [2, 9]}, "lora.ranks=9"),
            ({"rank": 2, "ranks": {"low": 2, "high": 9}}, "lora.ranks=9"),
        ],
    )
    def test_above_the_smaller_side_is_refused(self, folders, options, key):
        with pytest.raises(ModelError, match=rf"{key} .*v_proj' \(8 × 16\).* at most 8"):
            build(folders["llama"], **options)
        assert build(folders["llama"], rank=8).read().rank == 8


class TestStart:
    @pytest.mark.parametrize("layer", LAYERS)
    def test_follows_from_the_seed_alone(self, of_layer, layer):
        torch.manual_seed(111)
        one = of_layer(layer, seed=1).read().tensors()
        torch.manual_seed(222)
        again, other = of_layer(layer, seed=1).read().tensors(), of_layer(layer, seed=2).read().tensors()
        for name, tensor in one.items():
            assert torch.equal(tensor, again[name])
            if parse_name(name).part != "B" and not name.endswith("bias"):
                assert not torch.equal(tensor, other[name]), name

    def test_factors_are_drawn_apart_from_the_head(self, folders):
        """Another number of labels needs other draws for the head, and leaves A as it is."""
        config, lora = ModelConfig(name=str(folders["bert"])), LoraConfig(rank=2)
        few, many = (
            ResidentModel.build(OBJECTIVE, config, lora, list("abcdefg")[:n], PAD, 1, CPU).read() for n in (2, 7)
        )
        assert all(torch.equal(few.factors[module].A, many.factors[module].A) for module in few.modules)

    def test_two_resident_models_share_nothing(self, folders):
        one, two = build(folders["bert"]), build(folders["bert"])
        before = copy.deepcopy(two.read())
        one.load(randomised(one))
        assert same(two.read(), before)


def test_fp32_has_no_autocast(folders):
    with build(folders["bert"]).autocast():
        assert not torch.is_autocast_enabled("cpu")


class TestCores:
    @pytest.mark.parametrize("shape", [(4, 4), (2, 2, 2)])
    @pytest.mark.parametrize("layer", ["linear", "conv1d"])
    def test_a_core_between_the_factors_is_the_folded_adapter(self, of_layer, layer, shape, logits, tokens):
        resident = of_layer(layer, rank=4, alpha=7)
        plain = randomised(resident)
        g = torch.Generator().manual_seed(6)
        with_core = replace(plain, cores={module: torch.randn(shape, generator=g) for module in plain.modules})
        found = []
        for adapter in (with_core, with_core.folded(), plain, with_core):  # a core comes and goes with its adapter
            resident.load(adapter)
            assert same(resident.read(), adapter)
            found.append(logits(resident.peft, tokens()))
        torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
        assert torch.equal(found[0], found[3])
        assert (found[2] - found[0]).abs().max() > 1e-3

    @pytest.mark.parametrize(("parts", "each"), [({"core"}, 1), ({"A", "core"}, 2), ({"A", "B"}, 2), (set(), 0)])
    def test_it_is_trained_where_it_is_planned(self, of_layer, parts, each):
        resident = of_layer("linear", rank=4)
        plain = randomised(resident)
        resident.load(replace(plain, cores={module: torch.eye(4) for module in plain.modules}))
        chosen = resident.trainable(frozenset(parts))
        assert len(chosen) == each * len(plain.modules)
        assert all(parameter.requires_grad for parameter in chosen)

    def test_an_embedding_has_no_place_for_one(self, of_layer):
        resident = of_layer("embedding")
        adapter = resident.read()
        with pytest.raises(ModelError, match=r"word_embeddings' is no linear layer, and only these can have a core"):
            resident.load(replace(adapter, cores={module: torch.eye(2) for module in adapter.modules}))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_base_weight_of_a_module_is_outputs_by_inputs(of_layer, layer):
    resident = of_layer(layer)
    for module, pair in resident.read().factors.items():
        weight, held = resident.base_weight(module), frozen_layer(resident, module).weight
        assert weight.shape == pair.shape
        assert torch.equal(weight, held if layer == "linear" else held.T)


def update_of(resident: ResidentModel, seed: int = 8, rank: int = 3, scale: float = 0.3) -> BaseUpdate:
    """A base update of every adapted module."""
    g = torch.Generator().manual_seed(seed)
    shapes = {module: pair.shape for module, pair in resident.read().factors.items()}
    return BaseUpdate(
        {
            module: Factors(scale * torch.randn(d_out, rank, generator=g), torch.randn(rank, d_in, generator=g) * scale)
            for module, (d_out, d_in) in shapes.items()
        }
    )


def frozen_layer(resident: ResidentModel, module: str):
    """The layer of the base model under an adapted module."""
    return resident.peft.get_base_model().get_submodule(module).get_base_layer()


def equal_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


class TestBase:
    @pytest.mark.parametrize("variant", ["lora", "rslora"])
    @pytest.mark.parametrize("layer", LAYERS)
    def test_is_the_pre_trained_one_plus_left_times_right(self, of_layer, layer, variant, logits, tokens):
        options = {"rank": 3, "alpha": 7, "variant": variant}
        resident = of_layer(layer, **options)
        adapter, update = randomised(resident), update_of(resident)
        expected = by_hand(resident, adapter, LoraConfig(**options))
        resident.load(adapter)
        resident.set_base(update, ("run", 1))
        for module, pair in update.modules.items():
            found = expected.get_submodule(module)
            delta = pair.B @ pair.A
            with torch.no_grad():
                found.weight += delta.T if layer in ("conv1d", "embedding") else delta
        torch.testing.assert_close(logits(resident.peft, tokens()), logits(expected, tokens()), atol=1e-4, rtol=1e-4)
        assert same(resident.read(), adapter)

    @pytest.mark.parametrize("layer", LAYERS)
    def test_add_to_weight_knows_how_a_layer_stores_it(self, of_layer, layer):
        resident = of_layer(layer)
        for module, pair in update_of(resident).modules.items():
            found = frozen_layer(resident, module)
            before = found.weight.detach().clone()
            add_to_weight(found, pair)
            change = (found.weight - before).detach()
            delta = pair.B @ pair.A
            torch.testing.assert_close(change, delta if layer == "linear" else delta.T, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    @pytest.mark.parametrize("layer", LAYERS)
    def test_whichever_way_a_version_is_reached_its_bits_are_the_same(self, of_layer, layer, dtype):
        resident = of_layer(layer, dtype=dtype)
        pristine = base_weights(resident)
        one, two, other = (update_of(resident, seed=seed) for seed in (8, 9, 10))
        only = BaseUpdate(dict(list(other.modules.items())[:1]))  # another run need not change every module
        seen = {}
        for version, update in {("a", 1): one, ("a", 2): two, ("b", 1): only}.items():
            fresh = of_layer(layer, dtype=dtype)
            fresh.set_base(update, version)
            seen[version] = base_weights(fresh)
        path = [(("a", 1), one), (("a", 2), two), (("b", 1), only), (("a", 2), two), (("a", 1), one), (("b", 1), only)]
        for version, update in path:
            resident.set_base(update, version)
            assert equal_weights(base_weights(resident), seen[version]), version
        resident.set_base(BaseUpdate(), ("c", 5))
        assert equal_weights(base_weights(resident), pristine)
        assert len({id(weights) for weights in seen.values()}) == 3

    def test_a_bf16_base_keeps_updates_that_bf16_would_round_away(self, of_layer, logits, tokens):
        resident = of_layer("linear", dtype="bf16")
        update = update_of(resident, scale=0.01)
        module, pair = next(iter(update.modules.items()))
        before = frozen_layer(resident, module).weight.detach().float()
        resident.set_base(update, ("run", 1))
        change = frozen_layer(resident, module).weight.detach().float() - before
        torch.testing.assert_close(change, pair.B @ pair.A, atol=1e-7, rtol=1e-3)
        with resident.autocast():
            assert torch.isfinite(logits(resident.peft, tokens())).all()

    def test_nothing_is_done_at_the_same_version(self, of_layer):
        resident = of_layer("conv1d")
        update = update_of(resident)
        resident.set_base(update, ("run", 1))
        storage = {module: frozen_layer(resident, module).weight.data_ptr() for module in update.modules}
        held = base_weights(resident)
        resident.set_base(update, ("run", 1))
        assert {module: frozen_layer(resident, module).weight.data_ptr() for module in update.modules} == storage
        assert equal_weights(base_weights(resident), held)
        resident.set_base(BaseUpdate(), ("run", 0))
        plain = {module: frozen_layer(resident, module).weight.data_ptr() for module in update.modules}
        resident.set_base(BaseUpdate(), ("elsewhere", 7))  # every run without base updates is on the same base
        assert {module: frozen_layer(resident, module).weight.data_ptr() for module in update.modules} == plain

    def test_training_leaves_it_alone_and_it_stays_frozen(self, of_layer):
        resident = of_layer("linear")
        resident.set_base(update_of(resident), ("run", 1))
        chosen = resident.trainable(EVERY_PART)
        frozen = base_weights(resident)
        assert {id(p) for p in chosen} == {id(p) for p in resident.peft.parameters() if p.requires_grad}
        assert not any(p.requires_grad for n, p in resident.peft.named_parameters() if n in frozen)


def test_a_base_whose_weights_are_shared_is_refused_before_a_strategy_changes_them(folders):
    resident = build(folders["bert"], target_modules=["word_embeddings", "query"])
    resident.check_untied()
    base = resident.peft.get_base_model()
    base.head = torch.nn.Linear(16, 99, bias=False)
    base.head.weight = base.bert.embeddings.word_embeddings.get_base_layer().weight
    with pytest.raises(ModelError, match=r"'bert\.embeddings\.word_embeddings' shares its weight with 'head', and the"):
        resident.check_untied()


@pytest.mark.parametrize("strategy", ["flora", "fedit"])
def test_a_run_asks_that_where_the_strategy_changes_the_base(configure, tmp_path, monkeypatch, strategy):
    from fedlora.run.loop import train

    def shared(self):
        raise ModelError("shares its weight")

    monkeypatch.setattr(ResidentModel, "check_untied", shared)
    config = configure({"strategy": strategy, "rounds": 1, "training.local_steps": 1})
    if strategy == "fedit":
        train(config, tmp_path / "run")
    else:
        with pytest.raises(ModelError, match="shares its weight"):
            train(config, tmp_path / "run")
