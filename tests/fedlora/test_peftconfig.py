"""`adapter_config.json` from anyone: each value of its type, or one line; and nothing else goes on to PEFT."""

import json

import pytest

from fedlora.errors import AdapterError
from fedlora.peftconfig import read_configuration

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
