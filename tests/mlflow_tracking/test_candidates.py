"""Which setting of a sweep is the best, and whether it is better than another: made-up scores, checked by hand."""

import math

import pytest

from fedlora.errors import FedloraError
from fedlora.objective.classification import ACCURACY
from fedlora.objective.generation import LOSS
from fedlora.strategies import registry
from mlflow_tracking import candidates
from mlflow_tracking.candidates import Entrant, Score
from mlflow_tracking.judged import USUAL

LOW = (0.60, 0.62, 0.61)


def test_welch_by_hand():
    """Standard deviations .01, three seeds: standard error √(2·.0001/3) = .0081650, four degrees of freedom, where t of
    2.1318 is at 5 %."""
    for difference, better in ((0.0174, False), (0.0175, True)):
        found = candidates.compare([mean + difference for mean in LOW], LOW, (10, 10), ACCURACY)
        assert found.difference == pytest.approx(difference)
        assert found.better is better, "2.1318 × .0081650 = .017406"
    unequal = candidates.compare(
        [0.8, 0.6], [0.5, 0.5, 0.5], (10, 10), ACCURACY
    )  # t = .2 / .1 = 2 at one degree: 1/4 − atan(2)…
    assert f"p = {0.5 - math.atan(2) / math.pi:.2g}," in unequal.how
    assert not unequal.better


@pytest.mark.parametrize("ours", [[0.8], [0.8, 0.8]], ids=["one seed", "seeds that make no difference"])
def test_binomial_by_hand(ours):
    """1.64485 · √(.8·.2/400 + .75·.25/400) = .04848."""
    theirs = [0.75] * len(ours)
    found = candidates.compare(ours, theirs, (400, 400), ACCURACY)
    assert (found.difference, found.better) == (pytest.approx(0.05), True)
    assert found.how == "up to 0.0485 may be chance on 400 test examples"
    assert not candidates.compare(ours, theirs, (300, 300), ACCURACY).better, "1.64485 · √(.3475/300) = .05598"
    assert not candidates.compare(theirs, ours, (400, 400), ACCURACY).better


def test_less_is_better_of_a_loss_beyond_noise_only():
    """As by hand above, turned round; and one value of a loss tells nothing of its noise."""
    for difference, better in ((-0.0174, False), (-0.0175, True), (0.0175, False)):
        found = candidates.compare([mean + difference for mean in LOW], LOW, (10, 10), LOSS)
        assert (found.difference, found.better) == (pytest.approx(difference), better)
    for ours, theirs in (([0.1], [0.9]), ([0.1, 0.1], [0.9, 0.9]), ([0.9], [0.1])):
        found = candidates.compare(ours, theirs, (10**9, 10**9), LOSS)
        assert not found.better
        assert found.how == "how much of that is chance, one loss cannot tell: two seeds of each that differ are needed"


def entrant(run, settings, accuracy, data="d1", criterion=ACCURACY):
    score = Score(settings["seed"], accuracy, data)
    return Entrant(run, "1", settings["strategy"], settings, score, 100, USUAL, criterion)


def grid(accuracies, criterion=ACCURACY, **more):
    """Entrants by strategy: seeds 0, 1, …"""
    return [
        entrant(f"{strategy}{seed}", {"strategy": strategy, "seed": seed, **more}, accuracy, criterion=criterion)
        for strategy, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_the_best_setting_has_the_highest_mean_and_is_represented_by_its_best_run():
    found = candidates.best(grid({"svd": (0.5, 0.7, 0.6), "fedit": (0.9, 0.2, 0.3)}, **{"lora.rank": 4}), "mine")
    assert (found.run, found.label, found.sweep) == ("svd1", "svd lora.rank=4", "mine")
    assert [(score.seed, score.value) for score in found.scores] == [(0, 0.5), (1, 0.7), (2, 0.6)]
    assert str(found) == "svd lora.rank=4 (0.6000 ± 0.1000, 3 seeds)"


def test_of_losses_the_lowest_mean_is_the_best_and_its_lowest_run_stands_for_it():
    found = candidates.best(grid({"svd": (0.5, 0.7, 0.6), "fedit": (0.9, 0.2, 0.3)}, LOSS), "mine")
    assert (found.run, found.label, found.mean) == ("fedit1", "fedit", pytest.approx(1.4 / 3))


def test_a_setting_that_lacks_a_seed_does_not_compete():
    assert candidates.best(grid({"svd": (0.5, 0.7), "fedit": (0.9,)}), "mine").strategy == "svd"


def test_runs_of_different_test_sets_have_no_best_but_those_of_seeds_that_draw_the_same_ones_have():
    cells = [({"strategy": s, "seed": n}, a) for n in (0, 1) for s, a in (("svd", 0.6), ("fedit", 0.5))]
    drawn = [entrant(f"{c['strategy']}{c['seed']}", c, a, data=f"drawn by seed {c['seed']}") for c, a in cells]
    assert candidates.best(drawn, "mine").strategy == "svd"
    others = [entrant(f"{c['strategy']}{c['seed']}", c, a, data=f"of {c['strategy']}") for c, a in cells]
    with pytest.raises(FedloraError, match="sweep mine had different data or partitions"):
        candidates.best(others, "mine")


def test_controls_and_personal_strategies_leave_no_federated_adapter():
    left_out = {"oracle", "centralised", "local", "fedsa-lora"}
    assert {name for name in registry.names() if not candidates.may_compete(name)} == left_out


def test_conditions_are_called_by_the_last_parts_of_keys_and_paths():
    cells = [{"strategy": "svd", "seed": 0, "partition.alpha": 0.1, "data.name": name} for name in ("/a/x.csv", "y")]
    found = [entrant(str(place), cell, 0.5) for place, cell in enumerate(cells)]
    assert [*candidates.by_condition(found, ["partition.alpha", "data.name"])] == [
        "alpha=0.1 data=x.csv",
        "alpha=0.1 data=y",
    ]
    assert candidates.by_condition(found, []) == {"": found}
