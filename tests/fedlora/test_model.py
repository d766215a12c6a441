"""Base models of several architectures, small and random in temporary folders, and adapters attached to them."""

import copy
import json
import shutil

import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import AutoTokenizer

from fedlora import model
from fedlora.adapter import parse_name
from fedlora.config import LoraConfig, ModelConfig
from fedlora.errors import ModelError
from fedlora.model import ResidentModel

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
    return ResidentModel.build(config, LoraConfig(**{"rank": 2, "alpha": 6, **lora}), LABELS, pad, seed, CPU)


def randomised(resident: ResidentModel, seed: int = 3, scale: float = 1.0):
    """The resident model's adapter with other values everywhere, B included."""
    g = torch.Generator().manual_seed(seed)
    adapter = resident.read()
    changed = {name: scale * torch.randn(t.shape, generator=g) for name, t in adapter.tensors().items()}
    return type(adapter).from_tensors(changed)


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
        model.target_modules(network, LoraConfig())


def test_targets_leave_the_head_alone(folders):
    """RoBERTa's head has a layer `dense` of its own: it is trained whole, not adapted."""
    adapter = build(ModelConfig(name=str(folders["roberta"])), target_modules=["dense"]).read()
    assert all(module.startswith("roberta.") for module in adapter.modules)
    assert "classifier.dense.weight" in adapter.head


@pytest.mark.parametrize("names", [["quary"], ["query", "nothing"], ["self"]])
def test_a_target_that_matches_nothing_lists_what_there_is(folders, names):
    with pytest.raises(ModelError, match=rf"'{names[-1]}' matches no linear layer.*dense, key, query, value") as error:
        build(ModelConfig(name=str(folders["bert"])), target_modules=names)
    if names == ["quary"]:
        assert "Did you mean 'query'?" in str(error.value)


def test_rank_above_the_smaller_side_is_refused(folders):
    config = ModelConfig(name=str(folders["llama"]))
    with pytest.raises(ModelError, match=r"lora.rank=9 .*v_proj' \(8 × 16\).* at most 8"):
        build(config, rank=9)
    assert build(config, rank=8).read().rank == 8


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


@pytest.mark.parametrize(("name", "pooling"), [("bert", "mean"), ("bert", "head"), ("gpt2", "head"), ("llama", "head")])
def test_bf16_is_the_bases_precision_and_not_the_adapters(folders, name, pooling, logits, tokens):
    config = ModelConfig(name=str(folders[name]), pooling=pooling, dtype="bf16")
    resident = build(config)
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
    for tensor_name, tensor in resident.read().tensors().items():
        assert torch.equal(tensor, adapter.tensors()[tensor_name])  # no rounding on the way


def test_fp32_has_no_autocast(folders):
    with build(ModelConfig(name=str(folders["bert"]))).autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_what_is_loaded_is_read_back_and_what_is_read_is_a_copy(folders):
    resident = build(ModelConfig(name=str(folders["llama"])))
    adapter = randomised(resident)
    resident.load(adapter)
    first = resident.read()
    assert first.tensors().keys() == adapter.tensors().keys()
    assert all(torch.equal(tensor, adapter.tensors()[name]) for name, tensor in first.tensors().items())
    resident.load(randomised(resident, seed=4))
    assert all(torch.equal(tensor, adapter.tensors()[name]) for name, tensor in first.tensors().items())


@pytest.mark.parametrize("name", SHAPES)
def test_names_are_those_that_peft_saves(folders, name):
    resident = build(ModelConfig(name=str(folders[name])))
    saved = get_peft_model_state_dict(resident.peft)
    mine = resident.read().tensors()
    assert mine.keys() == saved.keys()
    assert all(torch.equal(mine[key], saved[key]) for key in saved)


@pytest.mark.parametrize("parts", [{"A", "B", "head"}, {"B", "head"}, {"A"}, {"B"}, set()])
def test_trainable_freezes_everything_else(folders, parts):
    resident = build(ModelConfig(name=str(folders["bert"])))
    resident.trainable(frozenset({"A", "B", "head"}))
    chosen = resident.trainable(frozenset(parts))
    wanted = [name for name in resident.read().tensors() if parse_name(name).part in parts]
    assert len(chosen) == len(wanted)
    assert {id(p) for p in chosen} == {id(p) for p in resident.peft.parameters() if p.requires_grad}


@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_forward_pass_adds_s_times_b_times_a(folders, name, variant, logits, tokens):
    """PEFT's forward pass against the base model with `s·B@A` added to its weights by hand (alpha ≠ rank)."""
    lora = LoraConfig(rank=3, alpha=7, variant=variant)
    config = ModelConfig(name=str(folders[name]))
    resident = build(config, rank=3, alpha=7, variant=variant)
    adapter = randomised(resident)
    resident.load(adapter)
    by_hand = model.load_base(config, LABELS, PAD)
    by_hand.load_state_dict({**by_hand.state_dict(), **adapter.head})
    for module, pair in adapter.factors.items():
        update = lora.scaling() * pair.product()
        weight = by_hand.get_submodule(module).weight
        with torch.no_grad():
            weight += update.T if name == "gpt2" else update  # Conv1D keeps in × out
    torch.testing.assert_close(logits(resident.peft, tokens()), logits(by_hand, tokens()), atol=1e-4, rtol=1e-4)
    assert lora.scaling() == pytest.approx(7 / 3 if variant == "lora" else 7 / 3**0.5)


def test_the_start_follows_from_the_seed_alone(folders):
    config = ModelConfig(name=str(folders["bert"]))
    torch.manual_seed(111)
    one = build(config, seed=1).read().tensors()
    torch.manual_seed(222)
    again, other = build(config, seed=1).read().tensors(), build(config, seed=2).read().tensors()
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name])
        part = parse_name(name).part
        if part == "B":
            assert not tensor.any()
        elif not name.endswith("bias"):
            assert not torch.equal(tensor, other[name]), name


def test_the_start_of_the_factors_is_drawn_apart_from_the_head(folders):
    """Another number of labels needs other draws for the head, and leaves A as it is."""
    config, lora = ModelConfig(name=str(folders["bert"])), LoraConfig(rank=2)
    few, many = (ResidentModel.build(config, lora, list("abcdefg")[:n], PAD, 1, CPU).read() for n in (2, 7))
    assert all(torch.equal(few.factors[module].A, many.factors[module].A) for module in few.modules)


def test_pooled_classifier_head_follows_from_the_seed():
    heads = [model.load_base(ModelConfig(), LABELS, PAD, seed).classifier.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_peft_config_is_plain_json_that_peft_reads(folders, tmp_path):
    import peft

    resident = build(ModelConfig(name=str(folders["gpt2"])), variant="rslora")
    (tmp_path / "adapter_config.json").write_text(json.dumps(resident.peft_config()))
    loaded = peft.LoraConfig.from_pretrained(tmp_path)
    assert (loaded.r, loaded.lora_alpha, loaded.use_rslora, loaded.inference_mode) == (2, 6, True, True)
    assert loaded.base_model_name_or_path == str(folders["gpt2"])
    assert "score" in loaded.modules_to_save


def test_two_resident_models_share_nothing(folders):
    config = ModelConfig(name=str(folders["bert"]))
    one, two = build(config), build(config)
    before = copy.deepcopy(two.read())
    one.load(randomised(one))
    assert all(torch.equal(t, before.tensors()[name]) for name, t in two.read().tensors().items())
