"""`fedlora bench`: figures that are finite, of the work that is named."""

import json
import math

import pytest
import torch

from fedlora.run import speed

SMALL = {"_CLIENTS": 4, "_MODULES": 1, "_REPEATS": 1, "_SIDE": {"cpu": 64}}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(speed, name, value)
    less = {"training.local_steps": 2, "data.train_size": 80, "data.test_size": 40}
    monkeypatch.setattr(speed, "_MODELS", tuple({**model, **less} for model in speed._MODELS))


def test_every_figure_is_a_number_with_a_unit():
    found = {figure.what: figure for figure in speed.figures(torch.device("cpu"), 1)}
    assert len(found) == 13
    assert all(math.isfinite(figure.value) and figure.value >= 0 and figure.unit for figure in found.values())
    for name in ("bert-tiny", "llama-tiny"):
        rate, share = found[f"training, {name}"].value, found[f"training, {name}: share of the product's rate"].value
        weights = 4 * share and share * found["matrix product, fp32"].value * 1e9 / 100 / rate / 4
        assert 1e5 < weights < 5e6  # of models with one and four million parameters
    assert found["writing, llama-tiny"].value > 0


def test_what_is_counted_is_what_is_multiplied():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2), torch.nn.Embedding(9, 9))
    assert speed._weights(model) == 3 * 5 + 5 * 2


def test_the_command_prints_them_and_writes_them_once_more(fedlora, tmp_path):
    code, out, _ = fedlora("bench", "--device", "cpu", "--out", tmp_path / "here.json")
    assert code == 0
    written = json.loads((tmp_path / "here.json").read_text())
    assert written["machine"]["device"] == "cpu"
    assert written["machine"]["versions"]["torch"] == torch.__version__
    for figure in written["figures"]:
        assert figure["what"] in out
        assert figure["unit"] in out


def test_a_device_that_is_not_there_is_one_line(fedlora, tmp_path):
    code, _, err = fedlora("bench", "--device", "cuda:77")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = fedlora("bench", "--device", "gpu")
    assert (code, err.count("\n")) == (2, 1)
    assert "gpu" in err
