"""The loss of the wanted positions alone, for architectures that scale, cap and project in ways of their own."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fedlora.config import ModelConfig
from fedlora.config.lora import LoraConfig
from fedlora.data.batches import pad
from fedlora.data.tokens import Examples, Padding
from fedlora.model import prediction
from fedlora.model.resident import ResidentModel
from fedlora.objective.generation import OBJECTIVE

VOCABULARY = 96
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**WIDTHS, "num_key_value_heads": 1, "head_dim": 8}
KINDS = {
    "llama": GROUPED,
    "gemma2": {**GROUPED, "final_logit_softcapping": 0.05, "query_pre_attn_scalar": 8},
    "granite": {**GROUPED, "logits_scaling": 3.0},
    "cohere": {**GROUPED, "logit_scale": 0.4},
    "nanochat": {**GROUPED, "final_logit_softcapping": 0.02},
    "minicpm3": {**WIDTHS, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8},
    "qwen3": GROUPED,
    "phi": WIDTHS,
    "gpt_neox": WIDTHS,
    "mixtral": {**GROUPED, "num_local_experts": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
    },
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "recurrent_gemma": {**GROUPED, "logits_soft_cap": 0.05, "lru_width": 16},
}
TOGETHER = {"opt"}
"""Whose output layer stands elsewhere: all logits are computed."""


def network(kind, **more):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **KINDS[kind], **more)).eval()


def batch(count=5):
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 12, count)
    ids = [rng.integers(3, VOCABULARY, length).astype(np.int32) for length in lengths]
    targets = [np.where(rng.random(len(row)) < 0.4, -100, row).astype(np.int32) for row in ids]
    examples = Examples(ids, None, np.zeros(count, np.int64), lengths.astype(np.int64), targets)
    return pad(examples, np.arange(count), Padding(0))


def wanted_of(made):
    following = nn.functional.pad(made.labels[:, 1:], (0, 1), value=-100)
    return (following != -100).flatten().nonzero()[:, 0], following[following != -100]


@pytest.mark.parametrize("parts", ["one", "several", "several that do not learn"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_transformers_own(kind, parts, monkeypatch):
    monkeypatch.setattr(prediction, "_NUMBERS", 2**24 if parts == "one" else 7 * VOCABULARY)
    model, made = network(kind), batch()
    if parts == "several that do not learn":
        model.get_output_embeddings().requires_grad_(False)
    theirs = model(**made.model_inputs(), labels=made.labels, use_cache=False).loss
    theirs.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours = prediction.cross_entropy(model, made.model_inputs(), *wanted_of(made))
    ours.backward()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6, msg=name)
    assert prediction._HALVES[model] == (kind not in TOGETHER)


@pytest.mark.parametrize("kind", ["gemma2", "opt"])
def test_sums_and_hits_are_those_of_all_logits(kind, monkeypatch):
    monkeypatch.setattr(prediction, "_NUMBERS", 3 * VOCABULARY)
    model, made = network(kind), batch()
    wanted, targets = wanted_of(made)
    with torch.inference_mode():
        logits = model(**made.model_inputs()).logits.flatten(0, 1)[wanted]
        total, hits = prediction.measured(model, made.model_inputs(), wanted, targets)
    assert float(total) == pytest.approx(float(nn.functional.cross_entropy(logits, targets, reduction="sum")), rel=1e-5)
    assert hits == int((logits.argmax(-1) == targets).sum())


def test_only_wanted_positions_become_logits(monkeypatch):
    model, made, rows = network("llama"), batch(), []
    wanted, targets = wanted_of(made)
    model.lm_head.requires_grad_(False)
    prediction.cross_entropy(model, made.model_inputs(), wanted, targets)  # after the trial
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    prediction.cross_entropy(model, made.model_inputs(), wanted, targets)
    assert rows == [len(targets)]
    assert len(targets) < made.labels.numel() / 2
    monkeypatch.setattr(prediction, "_NUMBERS", 4 * VOCABULARY)
    rows.clear()
    prediction.cross_entropy(model, made.model_inputs(), wanted, targets).backward()
    assert max(rows) == 4
    assert sum(rows) == 1 + len(targets)  # the one tells whether the output learns


def test_nothing_wanted_is_nothing(small_llama):
    model = network("llama")
    made = batch()
    none = torch.zeros(0, dtype=torch.long)
    assert prediction.measured(model, made.model_inputs(), none, none) == (0, 0)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_an_adapted_output_layer_learns(small_llama, variant, monkeypatch):
    """In several parts, each of which is computed again for the gradients."""
    config, lora = ModelConfig(name=str(small_llama())), LoraConfig(rank=4, variant=variant, target_modules=["lm_head"])
    model = ResidentModel.build(OBJECTIVE, config, lora, [], 0, 0, torch.device("cpu"))
    model.trainable(frozenset({"A", "B"}))
    made, found = batch(), {}
    for numbers in (2**24, 5 * 600):
        monkeypatch.setattr(prediction, "_NUMBERS", numbers)
        model.peft.zero_grad()
        OBJECTIVE.loss(model, made).mean.backward()
        found[numbers] = {name: p.grad.clone() for name, p in model._handles.items() if p.grad is not None}
    model.peft.zero_grad()
    model.peft(**made.model_inputs(), labels=made.labels).loss.backward()
    for gradients in found.values():
        for name, parameter in model._handles.items():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-7)
    assert any(gradient.abs().max() > 0 for gradient in found[5 * 600].values())


def test_what_a_library_put_on_the_body_stays(monkeypatch):
    """As accelerate does: a forward pass that is an attribute of the module."""
    model, made, called = network("llama"), batch(), []
    before = model.model.forward

    def hooked(*args, **inputs):
        called.append(1)
        return before(*args, **inputs)

    model.model.forward = hooked
    prediction.cross_entropy(model, made.model_inputs(), *wanted_of(made))
    called.clear()
    prediction.cross_entropy(model, made.model_inputs(), *wanted_of(made))
    assert called == [1]
    assert model.model.forward is hooked


def test_a_network_that_was_found_whole_is_left_as_it_was():
    """The trial is without dropout and draws nothing."""
    config = AutoConfig.for_model("gpt2", **COMMON, **KINDS["gpt2"], resid_pdrop=0.5)
    model = AutoModelForCausalLM.from_config(config).train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert prediction.has_halves(model)
    assert torch.equal(torch.rand(1), expected)
    assert all(module.training for module in model.modules())
