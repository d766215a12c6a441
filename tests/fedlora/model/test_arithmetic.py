"""Precision, quantised bases, attention and gradient checkpointing: what trains, what it costs, and what is refused."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedlora
from fedlora.adapter.base_update import BaseUpdate
from fedlora.adapter.weights import Factors
from fedlora.config import ModelConfig, TrainingConfig, configfile
from fedlora.config.lora import LoraConfig
from fedlora.data.batches import pad
from fedlora.data.tokens import Examples, Padding
from fedlora.errors import ConfigError, ModelError
from fedlora.model import arithmetic
from fedlora.model.resident import ResidentModel
from fedlora.objective import classification, generation
from fedlora.run import preflight
from fedlora.run.loop import train
from fedlora.run.runfolder import RunFolder
from fedlora.seeds import Turn
from fedlora.training import client

CPU = torch.device("cpu")
MODULE = "model.layers.0.self_attn.v_proj"


def dialogues(count=12, seed=0):
    """Of other lengths; the first third of each is not trained."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 20, count)
    ids = [rng.integers(5, 600, length).astype(np.int32) for length in lengths]
    targets = [np.where(np.arange(len(row)) < len(row) // 3, -100, row).astype(np.int32) for row in ids]
    return Examples(ids, None, np.zeros(count, np.int64), lengths.astype(np.int64), targets)


def build(folder, seed=0, lora=None, **model):
    config = ModelConfig(name=str(folder), **model)
    adapter = LoraConfig(
        **{"rank": 4, "dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]} | (lora or {})
    )
    return ResidentModel.build(generation.OBJECTIVE, config, adapter, [], 0, seed, CPU)


def trained(model, steps=16, rate=5e-2):
    start, training = model.read(), TrainingConfig(local_steps=steps, batch_size=6, learning_rate=rate)
    parts = frozenset({"A", "B", "magnitude"})
    return client.train(model, start, dialogues(), training, Turn(0, 1, 0), parts, Padding(0))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_every_precision_trains_adapters_in_fp32(wide_llama, dtype, quantization):
    model = build(wide_llama(), dtype=dtype, quantization=quantization)
    found = trained(model)
    assert found.losses[-1] < found.losses[0] - 0.1
    assert {tensor.dtype for tensor in found.adapter.tensors().values()} == {torch.float32}
    layer = model.peft.get_base_model().get_submodule(MODULE).get_base_layer()
    assert arithmetic.is_packed(layer) == (quantization != "none")
    assert not arithmetic.is_packed(model.peft.get_base_model().lm_head)
    if quantization == "none":
        assert layer.weight.dtype is arithmetic.DTYPES[dtype]


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantised_base_is_nearly_the_base_and_has_as_many_numbers(wide_llama, quantization):
    plain, packed = build(wide_llama()), build(wide_llama(), quantization=quantization)
    error = (plain.base_weight(MODULE) - packed.base_weight(MODULE)).norm() / plain.base_weight(MODULE).norm()
    assert 0 < error < {"int8": 0.02, "nf4": 0.15}[quantization]
    assert packed.base_weight(MODULE).shape == (32, 64)
    count = arithmetic.parameters(AutoModelForCausalLM.from_pretrained(wide_llama()))
    assert arithmetic.parameters(packed.peft.unload()) == count


def test_a_small_gradient_survives_in_fp16(wide_llama):
    """Without a scale, what is below 2⁻²⁴ becomes zero: gradients of a loss that is a millionth do."""
    model = build(wide_llama(), dtype="fp16", lora={"dropout": 0.0})
    plain = generation.OBJECTIVE.loss

    class Small:
        units = staticmethod(generation.OBJECTIVE.units)

        def loss(self, resident, batch):
            found = plain(resident, batch)
            return found._replace(mean=found.mean * 1e-6)

    model.objective = Small()
    start = model.read()
    training = TrainingConfig(local_steps=3, batch_size=6, optimizer="sgd", learning_rate=1e5, max_grad_norm=None)
    found = client.train(model, start, dialogues(), training, Turn(0, 1, 0), frozenset({"B"}), Padding(0)).adapter
    wanted = build(wide_llama(), lora={"dropout": 0.0})
    wanted.objective = Small()
    exact = client.train(wanted, start, dialogues(), training, Turn(0, 1, 0), frozenset({"B"}), Padding(0)).adapter
    for module, pair in exact.factors.items():
        assert torch.nn.functional.cosine_similarity(found.factors[module].B.flatten(), pair.B.flatten(), 0) > 0.9


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_checkpointing_changes_no_bit(wide_llama, dtype, quantization):
    how = {"dtype": dtype, "quantization": quantization}
    plain, less = (trained(build(wide_llama(), gradient_checkpointing=on, **how), 4) for on in (False, True))
    assert plain.losses == less.losses
    for name, tensor in plain.adapter.tensors().items():
        assert torch.equal(tensor, less.adapter.tensors()[name]), name


def test_checkpointing_keeps_less_for_the_gradients(wide_llama):
    def kept(on):
        model, found = build(wide_llama(), gradient_checkpointing=on, lora={"dropout": 0.0}), []
        model.trainable(frozenset({"A", "B"}))
        model.peft.train()
        batch = pad(dialogues(), np.arange(6), Padding(0))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.numel()) or t, lambda t: t):
            generation.OBJECTIVE.loss(model, batch)
        return sum(found)

    assert kept(True) < kept(False) / 2


def test_checkpointing_of_an_encoder_changes_no_bit(small_bert):
    def run(on):
        config = ModelConfig(name=str(small_bert()), pooling="mean", gradient_checkpointing=on)
        model = ResidentModel.build(classification.OBJECTIVE, config, LoraConfig(rank=2), ["a", "b"], 0, 0, CPU)
        rng = np.random.default_rng(0)
        ids = [rng.integers(5, 99, 9).astype(np.int32) for _ in range(8)]
        rows = Examples(ids, None, rng.integers(0, 2, 8), np.full(8, 9, np.int64))
        training = TrainingConfig(local_steps=3, batch_size=4)
        parts = frozenset({"A", "B", "head"})
        return client.train(model, model.read(), rows, training, Turn(0, 1, 0), parts, Padding(0)).losses

    assert run(True) == run(False)


@pytest.mark.parametrize("pooling", ["head", "mean"])
def test_a_quantised_classifier_keeps_its_head_in_fp32(folders, pooling):
    """Of DistilBERT's own the first layer too, which Transformers would quantise."""
    config = ModelConfig(name=str(folders["distilbert"]), pooling=pooling, quantization="int8", dtype="bf16")
    lora = LoraConfig(rank=2, target_modules="all-linear")
    model = ResidentModel.build(classification.OBJECTIVE, config, lora, ["a", "b"], 0, 0, CPU)
    base = model.peft.get_base_model()
    for name in ["classifier", "pre_classifier"] if pooling == "head" else ["classifier"]:
        assert {p.dtype for p in base.get_submodule(name).parameters()} == {torch.float32}
    assert any(arithmetic.is_packed(module) for module in model.peft.modules())


# -- base updates beside quantised layers


def update(rank):
    g = torch.Generator().manual_seed(3)
    return BaseUpdate.of({MODULE: Factors(torch.randn(32, rank, generator=g), torch.randn(rank, 64, generator=g) / 9)})


@pytest.mark.parametrize("rank", [2, 32])
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_base_update_is_applied_beside_a_quantised_layer(wide_llama, quantization, rank):
    """As if it were in the unpacked weight; the narrow one as factors, the wide one as a matrix."""
    model = build(wide_llama(), quantization=quantization, lora={"dropout": 0.0})
    layer, x = model.peft.get_base_model().get_submodule(MODULE), torch.randn(2, 3, 64)
    with torch.no_grad():
        before, pair = layer(x), update(rank).modules[MODULE]
        model.set_base(update(rank), "one")
        torch.testing.assert_close(layer(x), before + x @ (pair.B @ pair.A).T)
        model.set_base(update(rank).plus(update(rank)), "two")
        torch.testing.assert_close(layer(x), before + 2 * x @ (pair.B @ pair.A).T)
        model.set_base(BaseUpdate(), "none")
        assert torch.equal(layer(x), before)


def test_a_base_of_four_bits_that_was_scored_is_trained_like_one_that_was_not(wide_llama, monkeypatch):
    """On processors with bf16 bitsandbytes repacks what is scored, and then passes no gradient back."""
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    ids, slopes = torch.arange(5, 25)[None], []
    for scored in (False, True):
        model = build(wide_llama(), quantization="nf4")
        parameters = model.trainable(frozenset({"B"}))
        if scored:
            model.peft.eval()
            with torch.inference_mode():
                model.peft(input_ids=ids)
        model.peft.train()
        model.peft(input_ids=ids, labels=ids).loss.backward()
        slopes.append([parameter.grad for parameter in parameters])
    assert all(slope.any() for slope in slopes[0])
    torch.testing.assert_close(*slopes, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["flora", "fedex-lora", "oracle"])
def test_a_strategy_that_changes_the_base_runs_on_a_quantised_one(writing, wide_llama, tmp_path, strategy):
    """Its adapter is loaded as it was trained, and merged into the base in full precision."""
    changes = {"strategy": strategy, "model.quantization": "nf4", "model.name": str(wide_llama())}
    records = train(configfile.build({**writing, **changes}), tmp_path / "run")
    assert records[-1].metrics["global/loss"] < records[0].metrics["global/loss"] - 0.05
    model, tokenizer, _ = fedlora.load_adapter(tmp_path / "run" / "adapter")
    run = RunFolder(tmp_path / "run")
    ids = tokenizer("the seeds of a plant", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = model(ids).logits
    resident = ResidentModel.build(run.objective, run.config.model, run.config.lora, [], 0, 0, CPU)
    state = run.read_state(run.config.rounds)
    resident.set_base(state.base, "last")
    resident.load(state.adapter)
    resident.peft.eval()
    with torch.no_grad():
        torch.testing.assert_close(resident.peft(ids).logits, ours)
    fedlora.merge(tmp_path / "run" / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    with torch.no_grad():
        both = torch.stack([merged(ids).logits.flatten(), ours.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.98


# -- attention


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_what_is_said(wide_llama, attention):
    assert build(wide_llama(), attention=attention).peft.config._attn_implementation == attention


# -- what is refused before a run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.attention": "flash_attention_2"}, "attention=flash_attention_2 computes in bf16 or fp16"),
        ({"model.quantization": "int8", "lora.variant": "dora"}, "dora does not train on model.quantization=int8"),
        ({"model.quantization": "int4"}, "model.quantization='int4' is not allowed"),
    ],
)
def test_settings_that_do_not_go_together(writing, changes, words):
    with pytest.raises(ConfigError, match=words):
        configfile.build({**writing, **changes})


def test_flash_attention_without_a_gpu(writing):
    changes = {"model.attention": "flash_attention_2", "model.dtype": "bf16"}
    with pytest.raises(ModelError, match="flash_attention_2 is not to be had here: it needs a GPU of CUDA; use sdpa"):
        preflight.check(configfile.build({**writing, **changes}))


def test_quantization_without_its_package_and_on_another_device(writing, monkeypatch):
    with pytest.raises(ModelError, match=r"not on mps; set runner.device=cpu"):
        arithmetic.check(ModelConfig(quantization="nf4"), ["mps"])
    monkeypatch.setattr(arithmetic, "find_spec", lambda package: None)
    with pytest.raises(ModelError, match=r"nf4 needs bitsandbytes; install it: pip install 'fedlora\[quantized\]'"):
        preflight.check(configfile.build({**writing, "model.quantization": "nf4"}))


def test_a_model_without_checkpointing_or_the_attention(tmp_path, writing):
    from transformers import XLNetConfig, XLNetLMHeadModel

    config = XLNetConfig(vocab_size=600, d_model=16, n_layer=1, n_head=2, d_inner=24)
    XLNetLMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(writing["model.name"]).save_pretrained(tmp_path)
    lacking = {**writing, "model.name": str(tmp_path), "lora.target_modules": ["layer_1"]}
    with pytest.raises(ModelError, match=r"model.gradient_checkpointing=true, but the architecture of model.name="):
        preflight.check(configfile.build({**lacking, "model.gradient_checkpointing": True}))
    with pytest.raises(ModelError, match=r"model.attention=sdpa does not go with model.name="):
        preflight.check(configfile.build({**lacking, "model.attention": "sdpa"}))


def test_widths_that_bitsandbytes_unpacks_wrongly_on_a_cpu(writing, small_llama):
    """32 inputs are half a block of 64. The day it unpacks them, the first assertion fails, and the refusal can go."""
    import bitsandbytes.functional as bnb

    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    assert (bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4")) - weight).norm() > 0.15 * weight.norm()
    words = r"nf4 on the CPU: bitsandbytes unpacks 'model.layers.0.self_attn.q_proj' wrongly, whose 32 inputs"
    with pytest.raises(ModelError, match=words):
        preflight.check(configfile.build({**writing, "model.quantization": "nf4"}))
    with pytest.raises(ModelError, match=words):
        build(small_llama(), quantization="nf4")
    preflight.check(configfile.build({**writing, "model.quantization": "int8"}))


def test_fp16_on_a_cpu_is_said_to_be_slow(wide_llama):
    assert "fp16 on a CPU is several times slower" in build(wide_llama(), dtype="fp16").note
    assert build(wide_llama(), dtype="bf16").note == ""
    assert math.isfinite(trained(build(wide_llama(), dtype="fp16"), 2).losses[-1])
