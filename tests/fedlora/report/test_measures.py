"""Budgets, targets and fronts of curves whose answers are known."""

import math

import numpy as np
import pytest

from fedlora.report import measures, pareto
from fedlora.report.decision import decide
from fedlora.report.measures import Curve, front


@pytest.fixture
def curve():
    return Curve(np.array([0, 1, 2, 3]), np.array([0.1, 0.5, 0.4, 0.7]), np.array([0, 2, 4, 6]), np.array([1, 3, 5, 7]))


def test_a_score_at_a_budget_is_that_of_the_last_round_within_it(curve):
    assert curve.at(curve.megabytes, 4) == 0.4  # final, never best
    assert curve.at(curve.megabytes, 5.9) == 0.4
    assert curve.at(curve.seconds, 100) == 0.7
    assert math.isnan(curve.at(curve.seconds, 0.5))


def test_a_target_costs_what_was_spent_when_it_was_first_reached(curve):
    assert (curve.until(0.45, curve.rounds), curve.until(0.45, curve.megabytes), curve.until(0.7, curve.seconds)) == (
        1,
        2,
        7,
    )
    assert curve.until(0.9, curve.rounds) == math.inf


def test_the_area_is_the_mean_over_rounds(curve):
    assert curve.area == pytest.approx((0.3 + 0.45 + 0.55) / 3)


def test_the_front_is_what_nothing_beats_in_both():
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.8), (3.0, 0.7), (math.nan, 0.9), (0.5, 0.2)]
    assert front(points) == [5, 0, 2]
    assert front([]) == []


def test_measures_of_a_comparison(comparison):
    """svd ends at 0.6, 0.7 and 0.8: half of it after one of two rounds, 1 MB each."""
    decided = decide(comparison)
    found = measures.of(decided.conditions[0], measures.curves(comparison))
    assert found.target == pytest.approx(0.63)
    assert (found.megabytes, found.seconds) == (2.0, 4.0)
    svd, fedit = found.choices
    assert svd.at_megabytes == pytest.approx(0.7)
    assert svd.rounds_to == math.inf  # seed 0 ends at 0.6
    assert fedit.area == pytest.approx(np.mean([(0.1 + a / 2) / 4 + (a / 2 + a) / 4 for a in (0.58, 0.66, 0.74)]))


def test_seconds_after_a_resumed_round_are_not_known(make):
    made = make({"svd": {0: 0.6}})
    made.rounds["time/resumed"] = [None, 1.0, None]
    found = measures.curves(made)["svd-8-0"]
    assert found.seconds[0] == 0.0
    assert np.isnan(found.seconds[1:]).all()


def test_pictures_show_the_costs_that_were_measured_and_candidates_only(comparison):
    found = pareto.figures(decide(comparison))
    assert {figure.key for figure in found} == {"pareto-megabytes", "pareto-seconds"}
    assert [trace["text"] for trace in found[0].traces if "text" in trace] == [["svd"], ["fedit"]]
