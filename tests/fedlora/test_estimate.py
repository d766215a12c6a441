"""What a run will take: measured on a little of it, scaled by arithmetic."""

import pytest

from fedlora import configfile, estimate, home, sweeps
from fedlora.estimate import Pace
from flows.presets import PRESETS, SWEEPS

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


def test_a_trial_measures_the_run_and_leaves_nothing(tiny, tmp_path):
    text = "name: mine\nset:\n" + "".join(f"  {key}: {value!r}\n" for key, value in tiny.items() if value is not None)
    (tmp_path / "mine.yaml").write_text(text + "grid: {strategy: [fedit, svd], seed: [0, 1]}\n")
    plan = sweeps.load(str(tmp_path / "mine.yaml"), None, PRESETS, SWEEPS)
    before = set(home.runs().glob("*"))
    costs = estimate.sweep(plan.cells)
    assert costs.keys() == {cell.digest for cell in plan.cells}
    assert len(set(costs.values())) == 1  # one trial for all
    only = next(iter(costs.values()))
    assert 0.1 < only.seconds < 600
    assert 10**8 < only.memory < 10**10
    assert set(home.runs().glob("*")) == before
