"""Which modules are adapted: the ones that PEFT itself would adapt."""

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fedlora.config import ModelConfig, configfile
from fedlora.config.lora import LoraConfig
from fedlora.errors import ConfigError, ModelError
from fedlora.exchange.peftfolder import open_peft_folder
from fedlora.model import outline, targets
from fedlora.model.resident import ResidentModel
from fedlora.objective import classification, generation
from fedlora.run import preflight
from fedlora.run.loop import train

CPU = torch.device("cpu")
LABELS = ["cat", "dog", "hen"]
CHOICES = {
    "all-linear": {"target_modules": "all-linear"},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "output.dense"]},
    "an expression": {"target_modules": r".*\.(q_proj|down_proj|query|attention\.output\.dense)"},
    "one layer": {"target_modules": r".*layers?\.1\..*(proj|dense)"},
    "names but an expression": {"target_modules": ["v_proj", "value"], "exclude_modules": r".*layers?\.0\..*"},
}


def by_peft(network, kind, choice):
    adapted = get_peft_model(network, PeftConfig(r=2, task_type=kind, **choice))
    return {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}


def of_name(choice, there):
    """The lists of a choice, without the words that a model has not: each must be there."""
    return {
        key: [word for word in value if any(targets.peftpattern.chooses(word, name) for name in there)]
        if isinstance(value, list)
        else value
        for key, value in choice.items()
    }


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_classifiers_are_adapted_where_peft_would(folders, name, choice):
    plain = AutoModelForSequenceClassification.from_pretrained(folders[name], num_labels=3)
    choice = of_name(choice, targets.adaptable_modules(plain))
    config, lora = ModelConfig(name=str(folders[name])), LoraConfig(rank=2, **choice)
    resident = ResidentModel.build(classification.OBJECTIVE, config, lora, LABELS, 0, 0, CPU)
    assert set(resident.factors()) == by_peft(plain, "SEQ_CLS", choice) != set()


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_decoders_are_adapted_where_peft_would_and_a_check_before_the_run_knows(small_llama, choice):
    plain = AutoModelForCausalLM.from_pretrained(small_llama())
    choice = of_name(choice, targets.adaptable_modules(plain))
    config, lora = ModelConfig(name=str(small_llama())), LoraConfig(rank=2, **choice)
    resident = ResidentModel.build(generation.OBJECTIVE, config, lora, [], 0, 0, CPU)
    expected = by_peft(plain, "CAUSAL_LM", choice)
    assert set(resident.factors()) == expected
    assert not any("lm_head" in name or "embed" in name for name in expected)
    known = outline.of(config, generation.OBJECTIVE)
    assert {layer.name for layer in known.targets(lora)} == expected


def test_output_and_embeddings_are_adapted_where_they_are_named(small_llama):
    config = ModelConfig(name=str(small_llama()))
    lora = LoraConfig(rank=2, target_modules=["lm_head", "embed_tokens"])
    resident = ResidentModel.build(generation.OBJECTIVE, config, lora, [], 0, 0, CPU)
    assert {name.rpartition(".")[2] for name in resident.factors()} == {"lm_head", "embed_tokens"}


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_a_run_on_all_linear_layers_leaves_a_folder_of_names_alone(writing, tmp_path, variant):
    """Which `fedlora aggregate`, other programs and other models' names can do with; PEFT's expressions they cannot."""
    changes = {"lora.target_modules": r".*layers\.\d\.(mlp|self_attn)\..*", "lora.exclude_modules": "o_proj"}
    train(configfile.build({**writing, **changes, "lora.variant": variant, "rounds": 1}), tmp_path)
    folder = open_peft_folder(tmp_path / "adapter")
    assert len(folder.shapes) == 2 * 6
    assert folder.config["target_modules"] == sorted(folder.shapes)
    assert folder.config.get("exclude_modules") is None
    base = AutoModelForCausalLM.from_pretrained(writing["model.name"])
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").get_base_model()
    assert {name for name, each in loaded.named_modules() if hasattr(each, "lora_A")} == set(folder.shapes)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lora.target_modules=all-linear", "all-linear"),
        (r"lora.target_modules=.*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (r"lora.target_modules='[^.]*\.layers\.[0-3]\..*'", r"[^.]*\.layers\.[0-3]\..*"),
        ("lora.target_modules=model.layers.0.self_attn.q_proj", ["model.layers.0.self_attn.q_proj"]),
    ],
)
def test_what_a_word_on_the_command_line_means(given, meant):
    assert configfile.build(configfile.parse_overrides([given])).lora.target_modules == meant


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"lora.target_modules": ".*(q_proj"}, ConfigError, r"lora.target_modules.*no regular expression \(missing \)"),
        ({"lora.target_modules": ".*_prj"}, ModelError, r"expression '.*_prj' matches the whole name of no linear"),
        ({"lora.target_modules": "all_linear"}, ModelError, "'all_linear' matches no linear layer"),
        ({"lora.exclude_modules": "q_prj"}, ModelError, r"lora.exclude_modules: 'q_prj'.*Did you mean 'q_proj'\?"),
        ({"lora.exclude_modules": ["q_proj", "v_proj"]}, ModelError, "leaves nothing of lora.target_modules"),
    ],
)
def test_choices_that_are_refused_before_a_run(writing, changes, error, words):
    with pytest.raises(error, match=words) as refused:
        preflight.check(configfile.build({**writing, **changes}))
    assert "\n" not in str(refused.value)


@pytest.fixture
def tied(small_llama, tmp_path):
    """The small Llama with one weight for embedding and output."""
    shape = AutoConfig.from_pretrained(small_llama(), tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(small_llama()).save_pretrained(tmp_path / "tied")
    return {"model.name": str(tmp_path / "tied"), "lora.target_modules": ["lm_head", "q_proj"]}


@pytest.mark.parametrize("strategy", ["flora", "fedex-lora", "oracle"])
def test_a_tied_weight_that_a_strategy_would_change_is_refused_before_the_run(writing, tied, strategy):
    with pytest.raises(ModelError, match=r"'lm_head' shares its weight with 'model.embed_tokens'"):
        preflight.check(configfile.build({**writing, **tied, "strategy": strategy}))
    preflight.check(configfile.build({**writing, **tied, "strategy": strategy, "lora.target_modules": "all-linear"}))


def test_a_tied_weight_that_is_adapted_alone_is_told_of(writing, tied, tmp_path):
    said = []
    train(configfile.build({**writing, **tied, "rounds": 1}), tmp_path / "run", say=said.append)
    assert [line for line in said if "shares its weight with model.embed_tokens, which `fedlora merge` refuses" in line]
