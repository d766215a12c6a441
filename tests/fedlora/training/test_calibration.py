"""How many clients at a time: what is measured, what is made of it, and that it is kept."""

import pytest
import torch
from madeup import made

from fedlora.config import ModelConfig, TrainingConfig
from fedlora.config.lora import LoraConfig
from fedlora.data.tokens import Padding
from fedlora.files import home
from fedlora.model.resident import ResidentModel
from fedlora.objective.classification import OBJECTIVE
from fedlora.seeds import Turn
from fedlora.training import calibration
from fedlora.training.cohort import Member

RIGHT = Padding(0)
EPOCHS = TrainingConfig(local_steps=None, local_epochs=1, batch_size=4)


@pytest.fixture
def model(small_bert):
    config = ModelConfig(name=str(small_bert()), pooling="mean")
    return ResidentModel.build(OBJECTIVE, config, LoraConfig(rank=2), ["a", "b", "c"], 0, 0, torch.device("cpu"))


@pytest.fixture
def members(model):
    start = model.read()
    return [Member(start, made(4 + place, place), Turn(0, 1, place)) for place in range(3)]


def test_each_number_of_clients_has_a_rate(model, members):
    rates = calibration.measure(model, members, EPOCHS, RIGHT)
    assert list(rates)[:2] == [1, 2]
    assert set(rates) <= {1, 2, 4, 8}
    assert all(rate > 0 for rate in rates.values())


def trains(seconds, monkeypatch):
    """Training takes so long for so many clients; how many were trained."""
    asked, now = [], [0.0]

    def train(model, some, training, padding):
        assert training.local_steps == 2
        asked.append(len(some))
        now[0] += seconds(len(some))

    monkeypatch.setattr(calibration, "_train", train)
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: now[0])
    return asked


def test_rates_count_the_steps_of_all(model, members, monkeypatch):
    trains(lambda size: 2.0 + size, monkeypatch)
    rates = calibration.measure(model, members, EPOCHS, RIGHT)
    assert rates == pytest.approx({1: 2 / 3, 2: 4 / 4, 4: 8 / 6, 8: 16 / 10})


def test_it_ends_where_more_are_slower(model, members, monkeypatch):
    asked = trains(lambda size: size**2, monkeypatch)
    assert list(calibration.measure(model, members, EPOCHS, RIGHT)) == [1, 2, 4]
    assert set(asked) == {1, 2, 4}


def test_it_ends_where_the_memory_does(model, members, monkeypatch):
    def seconds(size):
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    trains(seconds, monkeypatch)
    assert list(calibration.measure(model, members, EPOCHS, RIGHT)) == [1, 2]


@pytest.mark.parametrize(
    ("rates", "most", "expected"),
    [
        ({1: 10, 2: 19, 4: 30, 8: 25}, 100, 4),
        ({1: 10, 2: 19, 4: 30, 8: 25}, 3, 2),
        ({1: 10, 2: 10.9}, 100, 1),
        ({1: 10, 2: 11.0}, 100, 2),
        ({1: 10, 2: 19}, 1, 1),
        ({1: 10}, 100, 1),
    ],
)
def test_the_fastest_is_taken_where_it_gains_a_tenth(rates, most, expected):
    assert calibration.best(rates, most) == expected


def test_what_was_measured_is_kept_by_its_key_and_made_again_where_it_is_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLORA_HOME", str(tmp_path))
    made_of = []

    def make():
        made_of.append(1)
        return {1: 10.0, 2: 20.5}

    assert [calibration.kept(["a", 1], make) for _ in range(3)] == [{1: 10.0, 2: 20.5}] * 3
    assert len(made_of) == 1
    calibration.kept(["a", 2], make)
    assert len(made_of) == 2
    file = next((home.cache() / "cohort").glob("*.json"))
    damages = ["", "{", "[]", '{"rates": {"2": 3}}', '{"rates": {"1": 0}}', '{"rates": {"1": 5, "x": 1}}', "9" * 20_000]
    for count, content in enumerate(damages, start=3):
        file.write_text(content)
        calibration.kept(["a", 1], make)
        calibration.kept(["a", 2], make)
        assert len(made_of) == count, content
