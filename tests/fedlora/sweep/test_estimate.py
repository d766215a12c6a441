"""What a run will take: the arithmetic; the trial itself is seen in `fedlora sweep --dry-run` (tests/fedlora_cli)."""

import pytest

from fedlora.config import configfile
from fedlora.sweep import estimate
from fedlora.sweep.estimate import Pace

PACE = Pace(setup=3.0, step=0.1, example=0.01, worker_bytes=10**9, test=100, train=800, local_test=10.0)


def config(**changes):
    values = {"rounds": 4, "clients": 8, "training.local_steps": 10, "runner.device": "cpu", "runner.slots": 2}
    return configfile.build({**values, **{key.replace("__", "."): value for key, value in changes.items()}})


def seconds(**changes):
    return estimate.cost(config(**changes), PACE).seconds


def test_the_parts_of_a_run_add_up():
    client = 10 * 0.1 + 10 * 0.01
    scoring = 100 * 0.01 / 2
    expected = 3.0 + 4 * (4 * client + scoring) * estimate._OVERHEAD + 2 * scoring  # 8 clients in 2 slots: 4 turns
    assert seconds() == pytest.approx(expected)
    assert estimate.cost(config(), PACE).memory == 2 * 10**9


def test_each_setting_counts():
    assert seconds(rounds=8) > 1.5 * seconds()
    assert seconds(fraction=0.5) < seconds()
    assert seconds(evaluation__local=False) < seconds()
    assert seconds(runner__slots=1) > 1.5 * seconds()
    epochs = {"training__local_steps": None, "training__local_epochs": 1, "training__batch_size": 10}
    assert seconds(**epochs) == pytest.approx(seconds())  # 800 / 8 / 10 = ten steps
