"""Base models of several architectures, small and random in temporary folders, and adapters attached to them."""

import json
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from fedlora.config import ModelConfig
from fedlora.config.lora import LoraConfig
from fedlora.errors import ModelError
from fedlora.model import base as model
from fedlora.model import targets
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import OBJECTIVE

LABELS = ["cat", "dog", "hen"]
CPU = torch.device("cpu")
PAD = 0
HEADS = {
    "bert": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "roberta": ["classifier"],
    "gpt2": ["score"],
    "llama": ["score"],
}
SHAPES = {
    "bert": {"query": (16, 16), "value": (16, 16)},
    "roberta": {"query": (16, 16), "value": (16, 16)},
    "gpt2": {"c_attn": (48, 16)},
    "llama": {"q_proj": (16, 16), "v_proj": (8, 16)},
}
"""PEFT's choice, with d_out × d_in: c_attn (a transposed Conv1D) and v_proj (grouped heads) are not square."""


@pytest.fixture
def encoder(folders, tmp_path):
    """A function: the small BERT as a sentence encoder that declares this pooling, in the layout of its library."""

    def make(**declared) -> ModelConfig:
        folder = tmp_path / "-".join(declared)
        shutil.copytree(folders["bert"], folder)
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **declared}))
        return ModelConfig(name=str(folder))

    return make


def build(config: ModelConfig, seed: int = 0, pad: int | None = PAD, **lora) -> ResidentModel:
    return ResidentModel.build(OBJECTIVE, config, LoraConfig(**{"rank": 2, "alpha": 6, **lora}), LABELS, pad, seed, CPU)


def padded(ids: torch.Tensor, by: int, pad: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask with `by` padding tokens on the right."""
    more = torch.full((len(ids), by), pad)
    return torch.cat([ids, more], 1), torch.cat([torch.ones_like(ids), torch.zeros_like(more)], 1)


def test_the_packaged_model_loads_with_mean_pooling_and_its_tokenizer(logits):
    config = ModelConfig()
    assert model.pooling_of(config) == "mean"
    tokenizer = model.load_tokenizer(config)
    base = model.load_base(config, LABELS, tokenizer.pad_token_id)
    assert model.head_modules(base) == ["classifier"]
    found = tokenizer(["a small dog", "an oak"], padding=True, return_tensors="pt")
    assert logits(base, found["input_ids"], found["attention_mask"]).shape == (2, len(LABELS))
    assert sum(p.numel() for p in base.encoder.parameters()) > 4e6


@pytest.mark.parametrize("name", HEADS)
def test_head_of_each_architecture(folders, name, logits, tokens):
    base = model.load_base(ModelConfig(name=str(folders[name])), LABELS, PAD)
    assert model.head_modules(base) == HEADS[name]
    assert base.config.id2label == dict(enumerate(LABELS))
    assert logits(base, tokens()).shape == (3, 3)


@pytest.mark.parametrize("name", SHAPES)
def test_default_targets_of_each_architecture(folders, name):
    adapter = build(ModelConfig(name=str(folders[name]))).read()
    found = {(module.rsplit(".", 1)[-1], (p.B.shape[0], p.A.shape[1])) for module, p in adapter.factors.items()}
    assert found == set(SHAPES[name].items())
    assert len(adapter.modules) == 2 * len(SHAPES[name])  # two layers
    assert {name.split(".")[0] for name in adapter.head} == set(HEADS[name])


def test_architecture_that_peft_has_no_choice_for_gets_its_query_and_value(folders):
    adapter = build(ModelConfig(name=str(folders["distilbert"]))).read()
    assert {name.rsplit(".", 1)[-1] for name in adapter.modules} == {"q_lin", "v_lin"}
    assert len(adapter.modules) == 4


def test_architecture_with_nothing_to_choose_by_lists_its_layers():
    from transformers import FNetConfig, FNetForSequenceClassification

    sizes = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 12}
    network = FNetForSequenceClassification(FNetConfig(**sizes))
    with pytest.raises(ModelError, match=r"no default lora.target_modules for architecture 'fnet'.*dense"):
        targets.target_modules(network, LoraConfig())


def test_targets_leave_the_head_alone(folders):
    """RoBERTa's head has a layer `dense` of its own: it is trained whole, not adapted."""
    adapter = build(ModelConfig(name=str(folders["roberta"])), target_modules=["dense"]).read()
    assert all(module.startswith("roberta.") for module in adapter.modules)
    assert "classifier.dense.weight" in adapter.head


@pytest.mark.parametrize("names", [["quary"], ["query", "nothing"], ["self"]])
def test_a_target_that_matches_nothing_lists_what_there_is(folders, names):
    with pytest.raises(
        ModelError, match=rf"'{names[-1]}' matches no linear layer.*dense, key, .*query, .*value"
    ) as error:
        build(ModelConfig(name=str(folders["bert"])), target_modules=names)
    if names == ["quary"]:
        assert "Did you mean 'query'?" in str(error.value)


@pytest.mark.parametrize(
    ("declared", "pooling"),
    [({"pooling_mode_mean_tokens": True}, "mean"), ({"pooling_mode_cls_token": True}, "cls")],
)
def test_auto_pooling_takes_what_a_sentence_encoder_declares(encoder, declared, pooling, logits, tokens):
    config = encoder(**declared, pooling_mode_max_tokens=False)
    base = model.load_base(config, LABELS)
    assert (model.pooling_of(config), base.pooling) == (pooling, pooling)
    hidden = base.eval().encoder(input_ids=tokens(), attention_mask=torch.ones(3, 7)).last_hidden_state
    expected = hidden.mean(1) if pooling == "mean" else hidden[:, 0]
    torch.testing.assert_close(logits(base, tokens()), base.classifier(expected).detach())


def test_other_pooling_is_refused_unless_one_is_chosen(encoder):
    config = encoder(pooling_mode_max_tokens=True)
    with pytest.raises(ModelError, match=r"pooling other than mean or cls; set model.pooling"):
        model.load_base(config, LABELS)
    assert model.load_base(config.model_copy(update={"pooling": "mean"}), LABELS).pooling == "mean"


def test_a_model_without_declaration_uses_its_own_head(folders):
    assert model.pooling_of(ModelConfig(name=str(folders["bert"]))) == "head"
    assert model.pooling_of(ModelConfig(name=str(folders["bert"]), pooling="cls")) == "cls"


@pytest.mark.parametrize(("name", "pooling"), [("bert", "mean"), ("bert", "cls"), ("gpt2", "head"), ("llama", "head")])
def test_padding_changes_nothing(folders, name, pooling, logits, tokens):
    base = model.load_base(ModelConfig(name=str(folders[name]), pooling=pooling), LABELS, PAD)
    plain = logits(base, tokens())
    for by in (1, 9):
        torch.testing.assert_close(logits(base, *padded(tokens(), by)), plain, atol=1e-6, rtol=1e-5)


def test_a_decoder_finds_the_last_token_by_the_tokenizers_padding_whatever_it_declares(tmp_path, save, logits, tokens):
    config = ModelConfig(name=str(save("gpt2", tmp_path / "other", pad_token_id=7)))
    base = model.load_base(config, LABELS, PAD)
    torch.testing.assert_close(logits(base, *padded(tokens(), 4)), logits(base, tokens()), atol=1e-6, rtol=1e-5)


def test_a_tokenizer_without_padding_token_pads_with_its_end(folders, tmp_path):
    folder = tmp_path / "decoder"
    shutil.copytree(folders["gpt2"], folder)
    tokenizer = AutoTokenizer.from_pretrained(model.resolve("bert-tiny"))
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", None
    tokenizer.save_pretrained(folder)
    loaded = model.load_tokenizer(ModelConfig(name=str(folder)))
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.convert_tokens_to_ids("[SEP]")


def test_pooled_classifier_head_follows_from_the_seed():
    heads = [model.load_base(ModelConfig(), LABELS, PAD, seed).classifier.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
