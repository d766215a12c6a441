"""`adapter_config.json` from anyone: each value of its type, or one line; and nothing else goes on to PEFT."""

import dataclasses
import json

import peft
import pytest

from fedlora.errors import AdapterError
from fedlora.exchange.peftconfig import KEYS, Treatment, read_configuration, read_with_notes

GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "use_dora": False}


@pytest.fixture
def read(tmp_path):
    def of(**changes):
        (tmp_path / "adapter_config.json").write_text(json.dumps(GOOD | changes))
        return read_configuration(tmp_path)

    return of


def test_only_what_an_adapter_needs_is_kept(read):
    alien = {"auto_mapping": {"parent_library": "os"}, "megatron_core": "antigravity", "tokenizer_name_or_path": "x/y"}
    assert read(**alien, runtime_config={}, init_lora_weights=True, revision=None) == GOOD


BAD = {
    "modules_to_save": [1, "head", [1], ["(a+)+"], {}],
    "lora_alpha": [10**400, True, "4", -1, float("nan"), 1e-320, [4]],
    "r": [True, "2", 2.0, -1, 2**40],
    "use_dora": ["false", 1],
    "rank_pattern": [["q"], {"q": "2"}, {"q": True}, {"q": 10**20}],
    "alpha_pattern": [{"q": 0}, {"q": None}, 3],
    "base_model_name_or_path": ["\ud800", "a\nb", "x" * 2000, ["a"]],
    "task_type": ["os.system", ["SEQ_CLS"]],
    "target_modules": [3, [3], {"q": 1}],
    "layers_to_transform": ["all", [[1]], -1],
    "bias": ["some", True],
    "trainable_token_indices": [[-1], {"(a+)+": [1]}, {"embed": "x"}],
    "layer_replication": [[[0, 10**9]]],
    "peft_type": ["PROMPT_TUNING", None, 3, ["LORA"]],
    "init_lora_weights": ["PiSSA", "loftq"],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_another_value_is_refused_with_its_key(read, key, value):
    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {key}( is|=)") as refused:
        read(**{key: value})
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 500


CONFIGS = {"LORA": peft.LoraConfig, "HIRA": peft.HiraConfig}
OF_BOTH = [(method, key) for method, keys in KEYS.items() for key in keys]


@pytest.mark.parametrize("method", CONFIGS)
def test_every_key_of_peft_is_classified(method):
    """A PEFT that has another one fails here: it may give tensors another meaning."""
    installed = {field.name for field in dataclasses.fields(CONFIGS[method])}
    assert installed - KEYS[method].keys() == set(), (
        "say in fedlora/exchange/peftconfig.py what is done about these keys"
    )
    assert KEYS[method].keys() - installed == set()


@pytest.mark.parametrize(("method", "key"), OF_BOTH)
def test_and_treated_as_it_says(read, method, key):
    known = KEYS[method][key]
    assert known.reason
    if known.treatment is Treatment.REFUSE and key != "init_lora_weights":
        with pytest.raises(AdapterError, match=f"{key} is set"):
            read(**{key: [1]})
    elif known.treatment in (Treatment.AGREE, Treatment.ALIGN):
        assert known.fits
        assert known.expected
    if known.default is not None:
        assert known.default == getattr(CONFIGS[method](), key)


def test_a_key_that_nobody_knows_is_noted(read, tmp_path):
    read(use_newlora=True, older=None, off=False)
    assert read_with_notes(tmp_path)[1] == ("'use_newlora'",)


@pytest.mark.parametrize(("value", "known"), [("lora", "LORA"), ("Hira", "HIRA")])
def test_the_method_is_spelt_as_peft_spells_it(read, value, known):
    assert read(peft_type=value)["peft_type"] == known
