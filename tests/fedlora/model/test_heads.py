"""The head of a fine-tuned classifier: its rows by the names of the classes, or a fresh one."""

import pytest
import torch
import transformers

from fedlora.config import ModelConfig
from fedlora.errors import ModelError
from fedlora.model import base as model
from fedlora.model import heads

NAMES = ["tech", "sport", "food"]
SIZES = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24},
    "roberta": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24},
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
}
LAST = {"bert": "classifier", "roberta": "classifier.out_proj", "distilbert": "classifier", "gpt2": "score"}


@pytest.fixture(params=SIZES)
def checkpoint(request, tmp_path):
    """`checkpoint(names)`: a classifier's folder, its model, and the name of its last layer."""

    def make(names=None):
        torch.manual_seed(1)
        declared = {"id2label": dict(enumerate(names))} if names else {"num_labels": 3}
        config = transformers.AutoConfig.for_model(
            request.param, vocab_size=50, pad_token_id=0, **SIZES[request.param], **declared
        )
        found = transformers.AutoModelForSequenceClassification.from_config(config)
        found.save_pretrained(tmp_path / "m")
        return ModelConfig(name=str(tmp_path / "m")), found, LAST[request.param]

    return make


def test_rows_follow_the_names(checkpoint):
    config, stored, last = checkpoint(NAMES)
    base = model.load_base(config, ["food", "sport", "tech"], 0)
    mine, theirs = base.get_submodule(last), stored.get_submodule(last)
    assert torch.equal(mine.weight, theirs.weight[[2, 1, 0]])
    assert mine.bias is None or torch.equal(mine.bias, theirs.bias[[2, 1, 0]])
    assert list(base.config.id2label.values()) == ["food", "sport", "tech"]
    for name in model.head_modules(base):
        for key, tensor in base.get_submodule(name).state_dict().items():
            if not f"{name}.{key}".startswith(last):
                assert torch.equal(tensor, stored.get_submodule(name).state_dict()[key])
    assert "its rows in the order of the labels (food from row 2" in getattr(base, heads.NOTE)
    ids = torch.tensor([[5, 7, 9]])
    with torch.no_grad():
        one, other = (each.eval()(ids, attention_mask=torch.ones_like(ids)).logits for each in (base, stored))
    torch.testing.assert_close(one, other[:, [2, 1, 0]])


def test_some_of_its_classes_are_enough_and_case_does_not_count(checkpoint):
    config, stored, last = checkpoint(["Tech", "Sport", "Food"])
    base = model.load_base(config, ["food", "tech"], 0)
    assert torch.equal(base.get_submodule(last).weight, stored.get_submodule(last).weight[[2, 0]])
    assert base.num_labels == 2


@pytest.mark.parametrize(
    ("declared", "labels"), [(NAMES, ["a", "b", "c"]), (NAMES, ["a", "b", "c", "d"]), (None, NAMES), (None, ["x", "y"])]
)
def test_other_classes_or_no_names_get_a_fresh_head(checkpoint, declared, labels):
    """Drawn by the seed alone: whatever the checkpoint's own head holds."""
    config, stored, last = checkpoint(declared)
    base = model.load_base(config, labels, 0, seed=3)
    fresh = base.get_submodule(last).weight
    assert fresh.shape == (len(labels), 16)
    assert not any(torch.equal(row, other) for row in fresh for other in stored.get_submodule(last).weight)
    assert "a fresh head: the checkpoint's is for other classes (3: " in getattr(base, heads.NOTE)
    again = model.load_base(config, labels, 0, seed=3)
    other = model.load_base(config, labels, 0, seed=4)
    assert torch.equal(fresh, again.get_submodule(last).weight)
    assert not torch.equal(fresh, other.get_submodule(last).weight)
    assert fresh.std() < 0.1  # of the size in which Transformers draws a head


def test_a_checkpoint_without_a_head_is_nothing_to_speak_of():
    base = model.load_base(ModelConfig(name="bert-tiny", pooling="head"), NAMES, 0)
    assert getattr(base, heads.NOTE) == ""


def test_weights_that_are_not_of_this_configuration_are_still_refused(checkpoint, tmp_path):
    config, stored, _ = checkpoint(NAMES)
    stored.config.vocab_size = 60
    stored.config.save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match=r"has another shape than config\.json says"):
        model.load_base(config, ["a", "b"], 0)


@pytest.mark.parametrize(
    ("declared", "labels", "rows"),
    [
        (["b", "a"], ["a", "b"], [1, 0]),
        (["A", "a"], ["a"], [1]),
        (["A", "a"], ["a", "A"], [1, 0]),
        (["A", "b"], ["a", "B"], [0, 1]),
        (["A", "a"], ["Á"], None),
        (["LABEL_0", "LABEL_1"], ["a", "b"], None),
        (["LABEL_0", "LABEL_1"], ["LABEL_0", "LABEL_1"], [0, 1]),
        (["a", "b"], ["a", "c"], None),
    ],
)
def test_which_row_is_whose(declared, labels, rows):
    assert heads.rows_by_name(dict(enumerate(declared)), labels) == rows
